//! The JSON of an image: which manifest fits this machine, what its layers and its configuration are.
//!
//! Follows the OCI image-spec 1.1 (image-layout.md, image-index.md, manifest.md, config.md), and the
//! `manifest.json` of `docker save` where there is no `index.json`.

use std::collections::BTreeSet;
use std::io::Read;

use serde::de::DeserializeOwned;

use super::digest::{BadDigest, Digest, HashingReader};
use super::docker;
use super::json::{Config, Descriptor, Index, Manifest, Platform, ProcessConfig};
use super::name;
use super::source::{Source, SourceError};

/// Longest JSON file, in bytes: containerd's limit for manifests is 8 MiB, registries' is 4 MiB.
pub(crate) const MAX_JSON: u64 = 4 << 20;

/// How deep indexes may nest.
pub(crate) const MAX_NESTING: u32 = 4;

/// How many manifests of an image are looked at.
const MAX_MANIFESTS: usize = 1000;

/// Most layers: Linux's overlayfs and docker stop at 127 and 125; other builders make more.
pub(crate) const MAX_LAYERS: usize = 1000;

/// Why no manifest could be chosen or read.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// A file of the image.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Neither of the known formats.
    #[error(
        "this is not an image: neither index.json (OCI) nor manifest.json (docker save) is there; \
         make one with `skopeo copy SOURCE oci-archive:FILE:NAME`"
    )]
    NotAnImage,
    /// JSON that does not parse.
    #[error("`{name}` is not valid: {source}")]
    Json {
        /// The file in the image.
        name: String,
        /// The error.
        source: serde_json::Error,
    },
    /// A digest that is none, or of another algorithm.
    #[error("in `{name}`")]
    Digest {
        /// The file in the image.
        name: String,
        /// The error.
        source: BadDigest,
    },
    /// A blob's bytes are not those of its digest.
    #[error("blob {expected} is damaged: it hashes to {found}")]
    Damaged {
        /// As referred to.
        expected: Digest,
        /// As computed.
        found: Digest,
    },
    /// A blob's size differs from its descriptor's.
    #[error("blob {digest} has {found} bytes, its descriptor says {expected}")]
    Size {
        /// The blob.
        digest: Digest,
        /// As in the descriptor.
        expected: u64,
        /// As found.
        found: u64,
    },
    /// Nothing for linux/amd64.
    #[error("the image has nothing for linux/amd64, only for: {found}")]
    Platform {
        /// What there is.
        found: String,
    },
    /// Several images in one file.
    #[error("there are several images in it ({found}): say which by --name")]
    Ambiguous {
        /// Their names.
        found: String,
    },
    /// None at all.
    #[error("the image's index is empty")]
    Empty,
    /// Indexes within indexes.
    #[error("the image's index is nested too deep, or lists too much")]
    TooDeep,
    /// Layers and diff_ids do not pair.
    #[error("the manifest has {layers} layers, the configuration {diff_ids} diff_ids")]
    Layers {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
}

/// The image chosen.
#[derive(Debug)]
pub(super) struct Chosen {
    /// Digest of its manifest.
    pub(super) manifest: Digest,
    /// The name that the index or `docker save` has for it.
    pub(super) name: Option<String>,
    pub(super) layers: Vec<Layer>,
    pub(super) config: ProcessConfig,
}

/// A layer to apply.
#[derive(Debug)]
pub(super) struct Layer {
    /// The file in the image.
    pub(super) file: String,
    /// Digest and size of that file; `docker save` states neither.
    pub(super) blob: Option<(Digest, u64)>,
    /// Digest of its uncompressed bytes.
    pub(super) diff_id: Digest,
}

/// Chooses the image for linux/amd64; among several by `wanted`.
pub(super) fn choose(source: &Source, wanted: Option<&str>) -> Result<Chosen, OciError> {
    if source.has("index.json") {
        choose_oci(source, wanted)
    } else if source.has("manifest.json") {
        docker::choose(source, wanted)
    } else {
        Err(OciError::NotAnImage)
    }
}

/// Reads through a blob and compares its bytes with its digest and size.
pub(super) fn verify(source: &Source, layer: &Layer) -> Result<(), OciError> {
    let Some((digest, size)) = layer.blob else {
        return Ok(());
    };
    let blob = source.blob(&layer.file)?;
    check_size(digest, size, blob.size())?;
    let mut hashing = HashingReader::new(blob);
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        match hashing.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(source) => {
                let name = layer.file.clone();
                return Err(SourceError::Read { name, source }.into());
            }
        }
    }
    match hashing.finish().0 {
        found if found == digest => Ok(()),
        found => Err(OciError::Damaged {
            expected: digest,
            found,
        }),
    }
}

fn check_size(digest: Digest, expected: u64, found: u64) -> Result<(), OciError> {
    if expected == found {
        return Ok(());
    }
    Err(OciError::Size {
        digest,
        expected,
        found,
    })
}

pub(super) fn parse<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|source| OciError::Json {
        name: name.to_owned(),
        source,
    })
}

fn parse_digest(name: &str, text: &str) -> Result<Digest, OciError> {
    text.parse().map_err(|source| OciError::Digest {
        name: name.to_owned(),
        source,
    })
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Reads a JSON blob and verifies it.
fn json_blob<T: DeserializeOwned>(
    source: &Source,
    descriptor: &Descriptor,
    of: &str,
) -> Result<(Digest, T), OciError> {
    let digest = parse_digest(of, &descriptor.digest)?;
    let name = blob_name(digest);
    let bytes = source.small(&name, MAX_JSON)?;
    check_size(digest, descriptor.size, bytes.len() as u64)?;
    let found = Digest::of(&bytes);
    if found != digest {
        return Err(OciError::Damaged {
            expected: digest,
            found,
        });
    }
    Ok((digest, parse(&name, &bytes)?))
}

/// A manifest that may be the one.
struct Candidate {
    descriptor: Descriptor,
    name: Option<String>,
}

fn choose_oci(source: &Source, wanted: Option<&str>) -> Result<Chosen, OciError> {
    let index: Index = parse("index.json", &source.small("index.json", MAX_JSON)?)?;
    let mut walk = Walk::default();
    walk.index(source, index, None, 0)?;
    let Walk {
        mut candidates,
        others,
        ..
    } = walk;
    if candidates.is_empty() {
        return Err(match others.is_empty() {
            true => OciError::Empty,
            false => OciError::Platform {
                found: others.into_iter().collect::<Vec<_>>().join(", "),
            },
        });
    }
    let digests: BTreeSet<String> = candidates
        .iter()
        .map(|c| c.descriptor.digest.clone())
        .collect();
    if let Some(wanted) = wanted {
        let matches = |c: &Candidate| {
            c.name
                .as_deref()
                .is_some_and(|name| same_name(name, wanted))
        };
        if digests.len() > 1 {
            candidates.retain(matches);
        }
    }
    let digests: BTreeSet<String> = candidates
        .iter()
        .map(|c| c.descriptor.digest.clone())
        .collect();
    if digests.len() != 1 {
        let found: Vec<String> = index_names(source)?;
        return Err(OciError::Ambiguous {
            found: found.join(", "),
        });
    }
    let Some(Candidate { descriptor, name }) = candidates.into_iter().next() else {
        return Err(OciError::Empty);
    };
    let (manifest_digest, manifest): (Digest, Manifest) =
        json_blob(source, &descriptor, "index.json")?;
    let of = blob_name(manifest_digest);
    let (_, config): (Digest, Config) = json_blob(source, &manifest.config, &of)?;
    let (diff_ids, process) = open_config(config, manifest.layers.len())?;
    let mut layers = Vec::with_capacity(diff_ids.len());
    for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
        let digest = parse_digest(&of, &layer.digest)?;
        layers.push(Layer {
            file: blob_name(digest),
            blob: Some((digest, layer.size)),
            diff_id,
        });
    }
    Ok(Chosen {
        manifest: manifest_digest,
        name,
        layers,
        config: process,
    })
}

/// Names in the top index, for a message.
fn index_names(source: &Source) -> Result<Vec<String>, OciError> {
    let index: Index = parse("index.json", &source.small("index.json", MAX_JSON)?)?;
    let name = |d: &Descriptor| ref_name(d).unwrap_or_else(|| d.digest.clone());
    Ok(index.manifests.iter().take(20).map(name).collect())
}

/// The name in a descriptor: containerd's full one, else the OCI annotation, which is often a tag only.
fn ref_name(descriptor: &Descriptor) -> Option<String> {
    [
        "io.containerd.image.name",
        "org.opencontainers.image.ref.name",
    ]
    .iter()
    .find_map(|key| descriptor.annotations.get(*key).cloned())
}

pub(super) fn same_name(found: &str, wanted: &str) -> bool {
    let tag = wanted.rsplit_once(':').map(|(_, tag)| tag);
    found == wanted
        || name::normalize(found)
            .is_ok_and(|found| name::normalize(wanted).is_ok_and(|wanted| wanted == found))
        || tag == Some(found)
}

#[derive(Default)]
struct Walk {
    candidates: Vec<Candidate>,
    /// Platforms that do not fit.
    others: BTreeSet<String>,
    seen: usize,
}

impl Walk {
    fn index(
        &mut self,
        source: &Source,
        index: Index,
        name: Option<&str>,
        depth: u32,
    ) -> Result<(), OciError> {
        if depth >= MAX_NESTING {
            return Err(OciError::TooDeep);
        }
        for descriptor in index.manifests {
            self.seen += 1;
            if self.seen > MAX_MANIFESTS {
                return Err(OciError::TooDeep);
            }
            let name = ref_name(&descriptor).or_else(|| name.map(str::to_owned));
            match descriptor.media_type.as_str() {
                "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json" => {
                    let (_, nested) = json_blob(source, &descriptor, "index.json")?;
                    self.index(source, nested, name.as_deref(), depth + 1)?;
                }
                _ => match &descriptor.platform {
                    Some(Platform {
                        architecture, os, ..
                    }) if (os.as_str(), architecture.as_str()) != ("linux", "amd64") => {
                        self.others.insert(format!("{os}/{architecture}"));
                    }
                    _ => self.candidates.push(Candidate { descriptor, name }),
                },
            }
        }
        Ok(())
    }
}

pub(super) fn open_config(
    config: Config,
    layers: usize,
) -> Result<(Vec<Digest>, ProcessConfig), OciError> {
    let fits = |found: &str, ours| found.is_empty() || found == ours;
    if !fits(&config.os, "linux") || !fits(&config.architecture, "amd64") {
        return Err(OciError::Platform {
            found: format!("{}/{}", config.os, config.architecture),
        });
    }
    let diff_ids = config.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() != layers || layers > MAX_LAYERS {
        return Err(OciError::Layers {
            layers,
            diff_ids: diff_ids.len(),
        });
    }
    let diff_ids = diff_ids
        .iter()
        .map(|text| parse_digest("the image's configuration", text))
        .collect::<Result<_, _>>()?;
    Ok((diff_ids, config.config.unwrap_or_default()))
}
