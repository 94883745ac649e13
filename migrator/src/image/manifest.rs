//! What a registry says an image is made of: which manifest fits this node, and whether it is one that can be used.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::digest::{BadDigest, Digest};
use super::json::{Descriptor, Index, Manifest};
use super::oci::MAX_LAYERS;

/// What is asked for. The order does not matter to registries.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Media types of a manifest.
const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Media types of an index.
const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// Media types of the configuration of an image that can be run.
const CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// Platforms named in an error.
const NAMED: usize = 20;

/// Why what a registry has cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// JSON of another form.
    #[error("its manifest is not valid")]
    Json(#[from] serde_json::Error),
    /// A digest of another form, or of an algorithm other than SHA-256.
    #[error("its manifest names something by a digest that is not used here")]
    Digest(#[from] BadDigest),
    /// The format of docker before 1.10.
    #[error(
        "it has a manifest of schema 1, a format that was given up in 2016: push it again with a newer docker or skopeo"
    )]
    Schema1,
    /// Another type.
    #[error("its manifest is of the type `{0}`, which is not known here")]
    Unknown(String),
    /// An OCI artifact: a chart, a signature, a module.
    #[error("it is not a container image: its configuration is of the type `{0}`")]
    Artifact(String),
    /// Nothing for this node.
    #[error("it has nothing for {wanted}, only for: {found}")]
    Platform {
        /// What was looked for.
        wanted: Platform,
        /// What there is.
        found: String,
    },
    /// An index that names an index.
    #[error("its index leads to another index")]
    Nested,
    /// A layer that is elsewhere.
    #[error(
        "layer {0} is not in the registry but somewhere else (a foreign layer): that is not followed"
    )]
    Foreign(Digest),
    /// More than an image has.
    #[error("it has {0} layers, more than {MAX_LAYERS}")]
    Layers(usize),
    /// Larger than an import takes.
    #[error("its layers have {size} bytes, more than the limit of {limit}")]
    TooLarge {
        /// Bytes of all layers.
        size: u64,
        /// Most that are taken.
        limit: u64,
    },
}

/// What the image must be made for. Guests are linux on amd64; the variant (`v2`, `v3`) is a matter of choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    variant: Option<String>,
}

/// A platform that no pod can have here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no platform of a pod: guests are linux/amd64, with a variant such as linux/amd64/v3 at most"
)]
pub struct BadPlatform(String);

impl std::str::FromStr for Platform {
    type Err = BadPlatform;

    fn from_str(text: &str) -> Result<Self, BadPlatform> {
        let bad = || BadPlatform(text.chars().take(80).collect());
        let mut parts = text.split('/');
        let variant = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("linux"), Some("amd64"), variant, None) => variant.map(str::to_owned),
            _ => return Err(bad()),
        };
        Ok(Self { variant })
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("linux/amd64")?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// A blob that a manifest names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// A manifest that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// Its type, as it goes into an index and into a push.
    pub(crate) media_type: String,
    pub(crate) config: Blob,
    /// In order; one may be there twice.
    pub(crate) layers: Vec<Blob>,
}

impl Image {
    /// Configuration and layers, each once.
    pub(crate) fn blobs(&self) -> Vec<Blob> {
        let mut seen = BTreeSet::new();
        std::iter::once(&self.config)
            .chain(&self.layers)
            .filter(|blob| seen.insert(blob.digest))
            .copied()
            .collect()
    }
}

/// What came for a reference.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The image.
    Image(Image),
    /// An index, and the manifest in it that fits.
    Choice(Blob),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    schema_version: Option<u32>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// Reads what came. `content_type` is the answer's header, for manifests that do not say what they are.
pub(crate) fn read(
    bytes: &[u8],
    content_type: Option<&str>,
    platform: &Platform,
) -> Result<Found, ManifestError> {
    let head: Head = serde_json::from_slice(bytes)?;
    let from_header = content_type
        .and_then(|text| text.split(';').next())
        .map(str::trim);
    let media_type = head
        .media_type
        .as_deref()
        .or(from_header)
        .unwrap_or_default();
    if head.schema_version == Some(1) || media_type.contains("distribution.manifest.v1") {
        return Err(ManifestError::Schema1);
    }
    let known = |types: &[&str]| types.contains(&media_type);
    // Some registries call everything JSON.
    let silent = matches!(media_type, "" | "application/json" | "text/plain");
    match head.manifests {
        Some(_) if known(&INDEXES) || silent => choose(bytes, platform).map(Found::Choice),
        None if known(&MANIFESTS) || silent => {
            let media_type = if silent { MANIFESTS[0] } else { media_type };
            image(bytes, media_type).map(Found::Image)
        }
        Some(_) | None => Err(ManifestError::Unknown(
            media_type.chars().take(100).collect(),
        )),
    }
}

/// Reads a manifest.
pub(crate) fn image(bytes: &[u8], media_type: &str) -> Result<Image, ManifestError> {
    let manifest: Manifest = serde_json::from_slice(bytes)?;
    let config_type = manifest.config.media_type.as_str();
    if !CONFIGS.contains(&config_type) {
        return Err(ManifestError::Artifact(
            config_type.chars().take(100).collect(),
        ));
    }
    if manifest.layers.len() > MAX_LAYERS {
        return Err(ManifestError::Layers(manifest.layers.len()));
    }
    let blob = |descriptor: &Descriptor| -> Result<Blob, ManifestError> {
        Ok(Blob {
            digest: descriptor.digest.parse()?,
            size: descriptor.size,
        })
    };
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for layer in &manifest.layers {
        let found = blob(layer)?;
        if layer.media_type.contains("foreign") || layer.media_type.contains("nondistributable") {
            return Err(ManifestError::Foreign(found.digest));
        }
        layers.push(found);
    }
    Ok(Image {
        media_type: media_type.to_owned(),
        config: blob(&manifest.config)?,
        layers,
    })
}

/// The type of a manifest that is kept: what it says itself, else OCI's.
pub(crate) fn own_type(bytes: &[u8]) -> Result<String, ManifestError> {
    let head: Head = serde_json::from_slice(bytes)?;
    Ok(head.media_type.unwrap_or_else(|| MANIFESTS[0].to_owned()))
}

/// Of an index the manifest for linux on amd64: of the variant asked for, else without one, else the first.
fn choose(bytes: &[u8], platform: &Platform) -> Result<Blob, ManifestError> {
    let index: Index = serde_json::from_slice(bytes)?;
    let mut fitting: Vec<(&Descriptor, Option<&str>)> = Vec::new();
    let mut others = BTreeSet::new();
    for entry in &index.manifests {
        let Some(of) = &entry.platform else {
            fitting.push((entry, None));
            continue;
        };
        if (of.os.as_str(), of.architecture.as_str()) == ("linux", "amd64") {
            fitting.push((entry, of.variant.as_deref()));
        }
        // What builders attach is for `unknown/unknown`.
        if of.os != "unknown" {
            let variant = of
                .variant
                .iter()
                .map(|v| format!("/{v}"))
                .collect::<String>();
            others.insert(format!("{}/{}{variant}", of.os, of.architecture));
        }
    }
    let wanted = platform.variant.as_deref();
    let exact = fitting.iter().find(|(_, variant)| *variant == wanted);
    let any = fitting.first().filter(|_| wanted.is_none());
    let Some((entry, _)) = exact.or(any) else {
        let found: Vec<String> = others.into_iter().take(NAMED).collect();
        return Err(ManifestError::Platform {
            wanted: platform.clone(),
            found: match found.is_empty() {
                true => "nothing".to_owned(),
                false => found.join(", "),
            },
        });
    };
    if INDEXES.contains(&entry.media_type.as_str()) {
        return Err(ManifestError::Nested);
    }
    Ok(Blob {
        digest: entry.digest.parse()?,
        size: entry.size,
    })
}

#[cfg(test)]
mod tests;
