//! The manifest that leads from an image to its chunks, and how it is found (OCI distribution-spec 1.1, "Listing Referrers"). Pure.

use serde::Deserialize;
use serde_json::{Value, json};

use super::index::MAX_INDEX;
use crate::image::Digest;
use crate::image::manifest::Blob;

/// Type of the artifact.
pub(super) const ARTIFACT: &str = "application/vnd.migrator.image.chunks.v1";
/// Type of its first layer, the index.
pub(super) const INDEX: &str = "application/vnd.migrator.image.chunks.index.v1";
/// Type of its other layers, the packs.
pub(super) const PACK: &str = "application/vnd.migrator.image.chunks.pack.v1";

/// An OCI manifest, and an OCI index.
pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The configuration of an artifact that has none (image-spec 1.1, "Guidance for an Empty Descriptor").
pub(super) const EMPTY: &[u8] = b"{}";
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";

/// Most packs of one image: 64 GiB of them.
const MAX_PACKS: usize = 1024;

/// Why an artifact is not used.
#[derive(Debug, thiserror::Error)]
pub enum BadArtifact {
    /// Not a manifest.
    #[error("the manifest of its chunks is not valid")]
    Json(#[from] serde_json::Error),
    /// A digest of another form.
    #[error("the manifest of its chunks has a digest that is not used here")]
    Digest(#[from] crate::image::digest::BadDigest),
    /// Another artifact.
    #[error("what is to have its chunks is a `{0}`")]
    Type(String),
    /// Of another image.
    #[error("these chunks are those of `{0}`")]
    OtherImage(String),
    /// No index, no packs, or more than there may be.
    #[error(
        "the manifest of its chunks has {0} layers where an index and up to {MAX_PACKS} packs are expected"
    )]
    Layers(usize),
    /// A layer of another type.
    #[error("layer {0} of its chunks is a `{1}`")]
    Layer(usize, String),
    /// An index of an absurd size.
    #[error("the index of its chunks has {0} bytes, more than {MAX_INDEX}")]
    LongIndex(u64),
}

/// The parts of an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Artifact {
    pub(super) index: Blob,
    pub(super) packs: Vec<Blob>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    artifact_type: Option<String>,
}

impl Descriptor {
    fn blob(&self) -> Result<Blob, BadArtifact> {
        Ok(Blob {
            digest: self.digest.parse()?,
            size: self.size,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    subject: Option<Descriptor>,
}

#[derive(Deserialize)]
struct Referrers {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

impl Artifact {
    /// Its manifest, for the image whose manifest is `subject`.
    pub(super) fn manifest(&self, subject: Blob, subject_type: &str) -> Vec<u8> {
        let descriptor = |kind: &str, blob: &Blob| json!({ "mediaType": kind, "digest": blob.digest, "size": blob.size });
        let empty = Blob {
            digest: Digest::of(EMPTY),
            size: EMPTY.len() as u64,
        };
        let mut layers = vec![descriptor(INDEX, &self.index)];
        layers.extend(self.packs.iter().map(|pack| descriptor(PACK, pack)));
        json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": ARTIFACT,
            "config": descriptor(EMPTY_TYPE, &empty),
            "layers": layers,
            "subject": descriptor(subject_type, &subject),
        })
        .to_string()
        .into_bytes()
    }

    /// Reads a manifest whose digest is right: that of the chunks of the image with the manifest `subject`.
    pub(super) fn read(bytes: &[u8], subject: Digest) -> Result<Self, BadArtifact> {
        let manifest: Manifest = serde_json::from_slice(bytes)?;
        let kind = manifest.artifact_type.unwrap_or(manifest.config.media_type);
        if kind != ARTIFACT {
            return Err(BadArtifact::Type(cut(&kind)));
        }
        let of = manifest
            .subject
            .map(|subject| subject.digest)
            .unwrap_or_default();
        if of != subject.to_string() {
            return Err(BadArtifact::OtherImage(cut(&of)));
        }
        let count = manifest.layers.len();
        let (index, packs) = manifest
            .layers
            .split_first()
            .ok_or(BadArtifact::Layers(0))?;
        if packs.len() > MAX_PACKS {
            return Err(BadArtifact::Layers(count));
        }
        let kinds = std::iter::once(INDEX).chain(std::iter::repeat(PACK));
        for (at, (layer, kind)) in manifest.layers.iter().zip(kinds).enumerate() {
            if layer.media_type != kind {
                return Err(BadArtifact::Layer(at, cut(&layer.media_type)));
            }
        }
        if index.size > MAX_INDEX {
            return Err(BadArtifact::LongIndex(index.size));
        }
        Ok(Self {
            index: index.blob()?,
            packs: packs
                .iter()
                .map(Descriptor::blob)
                .collect::<Result<_, _>>()?,
        })
    }
}

/// The tag under which a registry without the referrers API lists what refers to an image (distribution-spec, "Referrers Tag Schema").
pub(super) fn referrers_tag(subject: Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// Of what refers to an image, the manifests of chunks.
pub(super) fn chunk_manifests(list: &[u8]) -> Result<Vec<Digest>, BadArtifact> {
    let list: Referrers = serde_json::from_slice(list)?;
    let ours = list
        .manifests
        .iter()
        .filter(|found| found.artifact_type.as_deref() == Some(ARTIFACT));
    ours.map(|found| Ok(found.digest.parse()?)).collect()
}

/// The list under the referrers tag, with this artifact in it instead of earlier ones of its type. What else is in `before` stays.
pub(super) fn with_artifact(before: Option<&[u8]>, manifest: Blob) -> Vec<u8> {
    // A list that cannot be read is of no use to anybody, and is replaced.
    let before: Option<Value> = before.and_then(|bytes| serde_json::from_slice(bytes).ok());
    let others = before
        .as_ref()
        .and_then(|list| list["manifests"].as_array());
    let mut manifests: Vec<Value> = others
        .into_iter()
        .flatten()
        .filter(|one| one["artifactType"] != ARTIFACT)
        .cloned()
        .collect();
    manifests.push(json!({ "mediaType": OCI_MANIFEST, "artifactType": ARTIFACT, "digest": manifest.digest, "size": manifest.size }));
    json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests })
        .to_string()
        .into_bytes()
}

fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBJECT: Digest = Digest([3; 32]);

    fn blob(byte: u8) -> Blob {
        Blob {
            digest: Digest([byte; 32]),
            size: u64::from(byte),
        }
    }

    fn artifact() -> Artifact {
        Artifact {
            index: blob(1),
            packs: vec![blob(4), blob(5)],
        }
    }

    fn manifest() -> Value {
        let subject = Blob {
            digest: SUBJECT,
            size: 9,
        };
        serde_json::from_slice(&artifact().manifest(subject, OCI_MANIFEST)).unwrap()
    }

    fn read(manifest: &Value) -> Result<Artifact, BadArtifact> {
        Artifact::read(manifest.to_string().as_bytes(), SUBJECT)
    }

    #[test]
    fn a_manifest_reads_as_it_was_written() {
        assert_eq!(read(&manifest()).unwrap(), artifact());
        assert_eq!(
            manifest()["config"]["digest"],
            "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        );
    }

    #[test]
    fn other_artifacts_are_refused() {
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut manifest = manifest();
            change(&mut manifest);
            read(&manifest).unwrap_err()
        };
        assert!(matches!(
            refused(&|m| m["artifactType"] = json!("application/x-signature")),
            BadArtifact::Type(_)
        ));
        assert!(matches!(
            refused(&|m| drop(m.as_object_mut().unwrap().remove("subject"))),
            BadArtifact::OtherImage(_)
        ));
        assert!(matches!(
            refused(&|m| m["subject"]["digest"] = json!(Digest([4; 32]))),
            BadArtifact::OtherImage(_)
        ));
        assert!(matches!(
            refused(&|m| m["layers"] = json!([])),
            BadArtifact::Layers(0)
        ));
        assert!(matches!(
            refused(&|m| m["layers"][1]["mediaType"] = json!(INDEX)),
            BadArtifact::Layer(1, _)
        ));
        assert!(matches!(
            refused(&|m| m["layers"][0]["size"] = json!(u64::MAX)),
            BadArtifact::LongIndex(_)
        ));
        assert!(matches!(
            refused(&|m| m["layers"][0]["digest"] = json!("sha512:00")),
            BadArtifact::Digest(_)
        ));
        let many = vec![manifest()["layers"][1].clone(); MAX_PACKS + 2];
        assert!(matches!(
            refused(&|m| m["layers"] = json!(many)),
            BadArtifact::Layers(_)
        ));
    }

    #[test]
    fn a_new_list_keeps_what_others_have_in_it() {
        let other = json!({ "mediaType": OCI_MANIFEST, "artifactType": "application/x-signature", "digest": Digest([9; 32]), "size": 1, "annotations": { "a": "b" } });
        let before = json!({ "schemaVersion": 2, "manifests": [other] }).to_string();
        let once = with_artifact(Some(before.as_bytes()), blob(1));
        let twice = with_artifact(Some(&once), blob(2));
        assert_eq!(chunk_manifests(&twice).unwrap(), [blob(2).digest]);
        let list: Value = serde_json::from_slice(&twice).unwrap();
        assert_eq!(list["manifests"][0], other);
        assert_eq!(list["manifests"].as_array().unwrap().len(), 2);
        assert_eq!(
            chunk_manifests(&with_artifact(None, blob(1))).unwrap(),
            [blob(1).digest]
        );
    }

    #[test]
    fn the_tag_is_the_digest() {
        assert_eq!(
            referrers_tag(Digest([0xab; 32])),
            format!("sha256-{}", "ab".repeat(32))
        );
    }
}
