//! Writes an OCI image layout (image-spec 1.0): blobs by digest, one manifest, one index.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// One layer under construction: a tar archive with root's ownership and no times, so that it is reproducible.
pub struct Layer {
    archive: tar::Builder<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Layer {
        Layer {
            archive: tar::Builder::new(Vec::new()),
        }
    }
}

impl Layer {
    fn append(
        &mut self,
        kind: tar::EntryType,
        path: &str,
        mode: u32,
        data: &[u8],
        link: Option<&str>,
    ) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        match link {
            Some(link) => self.archive.append_link(&mut header, path, link),
            None => self.archive.append_data(&mut header, path, data),
        }
        .with_context(|| format!("cannot add {path} to a layer"))
    }

    /// A folder.
    ///
    /// # Errors
    /// The path does not fit a tar archive.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<()> {
        self.append(tar::EntryType::Directory, path, mode, &[], None)
    }

    /// A file.
    ///
    /// # Errors
    /// The path does not fit a tar archive.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.append(tar::EntryType::Regular, path, mode, data, None)
    }

    /// A symbolic link at `path` to `target`.
    ///
    /// # Errors
    /// The path does not fit a tar archive.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.append(tar::EntryType::Symlink, path, 0o777, &[], Some(target))
    }
}

/// Writes a layout with one image into `dir`, which must be empty or absent.
///
/// `config` is the `config` object of the image configuration: `Env`, `Cmd`, `WorkingDir` and so on.
///
/// # Errors
/// The folder cannot be written.
pub fn write(dir: &Path, reference: &str, layers: Vec<Layer>, config: &Value) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)
        .with_context(|| format!("cannot create {}", blobs.display()))?;
    let mut diff_ids = Vec::new();
    let mut descriptors = Vec::new();
    for layer in layers {
        let plain = layer.archive.into_inner()?;
        diff_ids.push(digest(&plain));
        let mut packed = GzEncoder::new(Vec::new(), Compression::default());
        packed.write_all(&plain)?;
        descriptors.push(blob(
            &blobs,
            "application/vnd.oci.image.layer.v1.tar+gzip",
            &packed.finish()?,
        )?);
    }
    let image = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": [],
    });
    let image = blob(
        &blobs,
        "application/vnd.oci.image.config.v1+json",
        &serde_json::to_vec(&image)?,
    )?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": image,
        "layers": descriptors,
    });
    let mut manifest = blob(
        &blobs,
        "application/vnd.oci.image.manifest.v1+json",
        &serde_json::to_vec(&manifest)?,
    )?;
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": reference });
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    std::fs::write(dir.join("index.json"), serde_json::to_vec(&index)?)
        .context("cannot write index.json")?;
    std::fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)
        .context("cannot write oci-layout")
}

/// Writes one blob and returns its descriptor.
fn blob(blobs: &Path, media_type: &str, bytes: &[u8]) -> Result<Value> {
    let digest = digest(bytes);
    let path = blobs.join(digest.trim_start_matches("sha256:"));
    std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
}

/// `sha256:` and 64 hex digits.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_descriptor_names_a_blob_with_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let mut layer = Layer::default();
        layer.dir("etc", 0o755).unwrap();
        layer.file("etc/hostname", 0o644, b"x\n").unwrap();
        layer.symlink("etc/alias", "hostname").unwrap();
        write(
            dir.path(),
            "a:1",
            vec![layer],
            &json!({ "Cmd": ["/bin/sh"] }),
        )
        .unwrap();
        let read = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
        };
        let blob_of = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().to_owned();
            let bytes =
                std::fs::read(dir.path().join("blobs").join(digest.replace(':', "/"))).unwrap();
            assert_eq!(descriptor["size"], bytes.len());
            assert_eq!(super::digest(&bytes), digest);
            bytes
        };
        let index = read("index.json");
        assert_eq!(
            index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"],
            "a:1"
        );
        let manifest: Value = serde_json::from_slice(&blob_of(&index["manifests"][0])).unwrap();
        let config: Value = serde_json::from_slice(&blob_of(&manifest["config"])).unwrap();
        let packed = blob_of(&manifest["layers"][0]);
        let mut plain = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&packed[..]), &mut plain)
            .unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], super::digest(&plain));
        assert_eq!(config["config"]["Cmd"][0], "/bin/sh");
    }
}
