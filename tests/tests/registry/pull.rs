//! What is pulled is what was made.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use migrator::image::{ImageRecord, ImageStore};
use migrator::registry::PullOptions;
use migrator_tests::registry::{Registry, fill, umoci_image};
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::cmd;

use super::{Puller, oci, plain, words};

/// The image as `image import` makes it.
fn imported(layout: &Path, at: &Path) -> Result<(ImageRecord, Vec<u8>)> {
    let store = ImageStore::open(at)?;
    let record = store.import(layout, Some("imported"))?;
    let bytes = device(&store, &record, &at.join("device"))?;
    Ok((record, bytes))
}

/// The block device of an image.
fn device(store: &ImageStore, record: &ImageRecord, at: &Path) -> Result<Vec<u8>> {
    store.copy_out(&record.erofs_digest, at)?;
    Ok(fs::read(at)?)
}

#[test]
fn a_pulled_image_is_bit_for_bit_the_imported_one() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 5)?;
    registry.store(&oci(&layout), "team/app:1", &[])?;
    registry.store(&oci(&layout), "team/docker:1", &["--format", "v2s2"])?;
    let (record, bytes) = imported(&layout, &work.path().join("images"))?;

    let name = format!("{}/team/app:1", registry.address());
    let (pulled, progress) = puller.told(&name, &plain());
    let pulled = pulled?;
    assert_eq!(pulled.record.name, name);
    assert_eq!(pulled.record.manifest_digest, record.manifest_digest);
    let device = device(&puller.store, &pulled.record, &work.path().join("device"))?;
    assert_eq!(device, bytes);
    assert!(progress.blobs.iter().all(|blob| blob.done == blob.size));
    let size: u64 = progress.blobs.iter().map(|blob| blob.size).sum();
    assert_eq!(pulled.transferred_bytes, size);
    assert!(
        puller.content("blobs")?.is_empty(),
        "layers are not kept unless asked for"
    );

    // Docker's own format is another manifest of the same files.
    let docker = puller.plain(&format!("{}/team/docker:1", registry.address()))?;
    assert_ne!(docker.record.manifest_digest, record.manifest_digest);
    assert_eq!(docker.record.erofs_digest, record.erofs_digest);
    Ok(())
}

#[test]
fn what_is_here_is_not_fetched_again() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 1)?;
    registry.store(&oci(&layout), "app:1", &[])?;
    let name = format!("{}/app", registry.address());
    let first = puller.plain(&format!("{name}:1"))?;
    let digest = first.record.manifest_digest;
    let second = puller.plain(&format!("{name}@{digest}"))?;
    assert_eq!(second.transferred_bytes, 0);
    // What a pod's file may say: the digest that it wants.
    let by_digest = puller.store.resolve(&format!("{name}@{digest}"))?;
    assert_eq!(by_digest.erofs_digest, first.record.erofs_digest);
    let named = PullOptions {
        name: Some("mine".to_owned()),
        ..plain()
    };
    puller.pull(&format!("{name}:1"), &named)?;
    assert_eq!(puller.store.resolve("mine")?.manifest_digest, digest);
    Ok(())
}

#[test]
fn an_image_of_buildah_in_several_layers_is_pulled() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    let files = work.path().join("files");
    fill(&files, 1)?;
    let buildah = |words: &[&str]| {
        let mut command = cmd::command("buildah", ["--root"]);
        command.arg(work.path().join("root"));
        command.arg("--runroot").arg(work.path().join("run"));
        command.args(["--storage-driver", "vfs"]).args(words);
        cmd::output(&mut command).map(|out| out.trim().to_owned())
    };
    let mut image = "scratch".to_owned();
    for layer in ["one", "two"] {
        fs::write(files.join("layer"), layer)?;
        let container = buildah(&["from", &image])?;
        let from = files.to_str().context("a path")?;
        buildah(&["copy", &container, from, &format!("/{layer}")])?;
        buildah(&["config", "--cmd", "/one/bin/tool", &container])?;
        image = format!("localhost/{layer}");
        buildah(&["commit", &container, &image])?;
    }
    let target = format!("docker://{}/built:1", registry.address());
    buildah(&["push", "--tls-verify=false", &image, &target])?;
    let (pulled, progress) = puller.told(&format!("{}/built:1", registry.address()), &plain());
    let record = pulled?.record;
    assert_eq!(record.config.cmd, ["/one/bin/tool"]);
    assert_eq!(progress.blobs.len(), 3, "a configuration and two layers");
    Ok(())
}

/// A layout with an index for two platforms over the one image of `layout`.
fn two_platforms(layout: &Path) -> Result<()> {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let entry = &index["manifests"][0];
    let blobs = layout.join("blobs/sha256");
    let store = |value: &Value| -> Result<Value> {
        let bytes = serde_json::to_vec(value)?;
        let digest = migrator::image::Digest::of(&bytes);
        fs::write(blobs.join(digest.hex()), &bytes)?;
        Ok(json!({ "digest": digest.to_string(), "size": bytes.len() }))
    };
    let read = |digest: &Value| -> Result<Value> {
        let hex = digest
            .as_str()
            .context("no digest")?
            .trim_start_matches("sha256:");
        Ok(serde_json::from_slice(&fs::read(blobs.join(hex))?)?)
    };
    // The same layers, for a machine that this is not.
    let mut manifest = read(&entry["digest"])?;
    let mut config = read(&manifest["config"]["digest"])?;
    config["architecture"] = json!("arm64");
    let stored = store(&config)?;
    for key in ["digest", "size"] {
        manifest["config"][key] = stored[key].clone();
    }
    let mut other = store(&manifest)?;
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    other["mediaType"] = json!(manifest_type);
    other["platform"] = json!({ "os": "linux", "architecture": "arm64" });
    let own = json!({
        "mediaType": manifest_type,
        "digest": entry["digest"],
        "size": entry["size"],
        "platform": { "os": "linux", "architecture": "amd64" },
    });
    let index_type = "application/vnd.oci.image.index.v1+json";
    for (tag, entries) in [("both", json!([other, own])), ("arm", json!([other]))] {
        let nested = json!({ "schemaVersion": 2, "mediaType": index_type, "manifests": entries });
        let mut top = store(&nested)?;
        top["mediaType"] = json!(index_type);
        top["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        let whole = json!({ "schemaVersion": 2, "manifests": [top] });
        let folder = layout.with_file_name(tag);
        cmd::output(cmd::command("cp", ["-r"]).args([layout, &folder]))?;
        fs::write(folder.join("index.json"), whole.to_string())?;
    }
    Ok(())
}

#[test]
fn of_an_image_for_many_platforms_the_guests_is_taken() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 1)?;
    two_platforms(&layout)?;
    for tag in ["both", "arm"] {
        let source = format!("oci:{}:{tag}", work.path().join(tag).display());
        registry.store(&source, &format!("app:{tag}"), &["--all"])?;
    }
    let (record, _) = imported(&layout, &work.path().join("images"))?;
    let pulled = puller.plain(&format!("{}/app:both", registry.address()))?;
    assert_eq!(pulled.record.manifest_digest, record.manifest_digest);
    let error = puller
        .plain(&format!("{}/app:arm", registry.address()))
        .expect_err("nothing for amd64");
    let words = words(&error);
    ensure!(
        words.contains("nothing for linux/amd64, only for: linux/arm64"),
        "{words}"
    );
    Ok(())
}

#[test]
fn a_mirror_is_asked_first_and_the_registry_when_it_fails() -> Result<()> {
    let (registry, mirror, work) = (Registry::open()?, Registry::open()?, TempDir::new()?);
    let layout = umoci_image(work.path(), 1)?;
    registry.store(&oci(&layout), "app:1", &[])?;
    mirror.store(&oci(&layout), "app:1", &[])?;
    registry.store(&oci(&layout), "app:2", &[])?;
    let name = registry.address();
    let with = |urls: &[&str]| {
        Puller::with(&json!({ "mirrors": { name: urls }, "plain_http": [name] }).to_string())
    };
    // Nobody listens there any more.
    let gone = Registry::open()?.address().to_owned();
    let (gone, there) = (
        format!("http://{gone}"),
        format!("http://{}", mirror.address()),
    );
    let default = PullOptions::default();

    let puller = with(&[&gone, &there])?;
    let pulled = puller.pull(&format!("{name}/app:1"), &default)?;
    assert_eq!(pulled.record.name, format!("{name}/app:1"));
    // The mirror lacks this one.
    let (pulled, progress) = puller.told(&format!("{name}/app:2"), &default);
    pulled?;
    let note = progress.note.context("the mirror's failure is told")?;
    assert!(note.contains("has no manifest of `2`"), "{note}");

    // With the registry gone, the mirror is enough.
    let name = name.to_owned();
    let puller = with(&[&there])?;
    drop(registry);
    puller.pull(&format!("{name}/app:1"), &default)?;
    Ok(())
}
