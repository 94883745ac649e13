//! Chunks of images in a registry: pushed beside the image, found, and read by ranges.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use migrator::image::{Digest, ImageRecord};
use migrator::registry::chunks::{ChunkError, RemoteChunks};
use migrator::registry::{Meter, PullError, PushError, PushOptions, Pushed};
use migrator_tests::registry::{Registry, Setup, TokenServer, log_in};
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::cmd;
use xtask::oci::{self, Layer};

use super::{Puller, plain, runtime, words};

/// Bytes of noise in the image: some dozens of chunks.
const NOISE: usize = 6 << 20;

/// An OCI layout `layout:latest` with noise, the same noise once more, and zeros.
pub(crate) fn layout(folder: &Path) -> Result<String> {
    use std::io::Read as _;
    let mut noise = vec![0; NOISE];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut noise)?;
    let mut layer = Layer::default();
    layer.dir("bin", 0o755)?;
    layer.file("bin/tool", 0o755, b"#!/bin/sh\n")?;
    layer.file("noise", 0o644, &noise)?;
    layer.file("zeros", 0o644, &vec![0; 2 << 20])?;
    layer.file("words", 0o644, &b"words that compress ".repeat(100_000))?;
    let dir = folder.join("layout");
    oci::write(
        &dir,
        "latest",
        vec![layer],
        &json!({ "Cmd": ["/bin/tool"] }),
    )?;
    Ok(super::oci(&dir))
}

pub(crate) fn with_chunks() -> PushOptions {
    PushOptions {
        plain_http: true,
        chunks: true,
        ..PushOptions::default()
    }
}

/// A registry with an image and its chunks, pushed by a node that still has it.
pub(crate) struct Scene {
    pub(crate) registry: Registry,
    pub(crate) origin: Puller,
    pub(crate) record: ImageRecord,
    pub(crate) pushed: Pushed,
    _work: TempDir,
}

impl Scene {
    pub(crate) fn new() -> Result<Self> {
        let (registry, work, origin) = (Registry::open()?, TempDir::new()?, Puller::new()?);
        registry.store(&layout(work.path())?, "app:1", &[])?;
        let name = format!("{}/app:1", registry.address());
        let record = origin.plain(&name)?.record;
        let pushed = origin.push(&name, &name, &with_chunks())?;
        Ok(Self {
            registry,
            origin,
            record,
            pushed,
            _work: work,
        })
    }

    pub(crate) fn name(&self) -> String {
        format!("{}/app:1", self.registry.address())
    }

    /// Every chunk is as the node that pushed has it.
    pub(crate) fn check_all(&self, chunks: &Arc<RemoteChunks>) -> Result<()> {
        ensure!(chunks.record().erofs_digest == self.record.erofs_digest);
        let all = (0u32..).zip(&self.record.chunks);
        let mut zeros = 0;
        for (index, digest) in all {
            let expected = self
                .origin
                .store
                .read_chunk(&self.record.erofs_digest, index)?;
            if !chunks.has(digest) {
                ensure!(
                    expected.iter().all(|byte| *byte == 0),
                    "chunk {index} is missing"
                );
                zeros += 1;
                continue;
            }
            let found = runtime().block_on(chunks.chunk(digest, false));
            ensure!(
                found.map_err(anyhow::Error::msg)? == expected,
                "chunk {index} differs"
            );
        }
        ensure!(zeros > 4, "{zeros} chunks of zeros");
        Ok(())
    }
}

/// The chunks that another node finds.
pub(crate) fn find(puller: &Puller, name: &str) -> Result<Option<Arc<RemoteChunks>>, PullError> {
    find_with(puller, name, &plain())
}

pub(crate) fn find_with(
    puller: &Puller,
    name: &str,
    options: &migrator::registry::PullOptions,
) -> Result<Option<Arc<RemoteChunks>>, PullError> {
    let reference = name.parse().expect("a reference");
    let (meter, _progress) = Meter::new();
    let found = runtime().block_on(puller.registries.chunks(&reference, options, &meter));
    found.map(|found| found.map(Arc::new))
}

/// What the registry has under a name, as skopeo reads it.
fn raw(name: &str) -> Result<Value> {
    let mut inspect = cmd::command("skopeo", ["inspect", "--raw", "--tls-verify=false"]);
    let text = cmd::output(inspect.arg(format!("docker://{name}")))?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn chunks_are_found_beside_an_image_and_are_those_of_its_device() -> Result<()> {
    let scene = Scene::new()?;
    let pushed = scene.pushed.chunks.clone().context("chunks were pushed")?;
    // Zeros are not stored, and the words are small.
    ensure!(
        pushed.plain_bytes < scene.record.erofs_size - (1 << 20),
        "{pushed:?}"
    );
    ensure!(
        pushed.packed_bytes < pushed.plain_bytes - (1 << 20),
        "{pushed:?}"
    );
    let puller = Puller::new()?;
    let chunks = find(&puller, &scene.name())?.context("there are chunks")?;
    ensure!(chunks.artifact() == pushed.artifact);
    scene.check_all(&chunks)?;
    // Each is fetched once and by itself.
    ensure!(
        chunks.transferred() <= pushed.packed_bytes * 11 / 10,
        "{}",
        chunks.transferred()
    );
    ensure!(puller.is_empty()?, "looking makes nothing");
    // The image is still the one that it was.
    ensure!(puller.plain(&scene.name())?.record.erofs_digest == scene.record.erofs_digest);
    Ok(())
}

#[test]
fn what_is_pushed_is_an_oci_artifact_under_the_referrers_tag() -> Result<()> {
    let scene = Scene::new()?;
    let repository = format!("{}/app", scene.registry.address());
    let tag = format!("{repository}:sha256-{}", scene.record.manifest_digest.hex());
    let list = raw(&tag)?;
    let entry = &list["manifests"][0];
    ensure!(
        entry["artifactType"] == "application/vnd.migrator.image.chunks.v1",
        "{list}"
    );
    let digest = entry["digest"].as_str().context("no digest")?;
    let manifest = raw(&format!("{repository}@{digest}"))?;
    ensure!(
        manifest["subject"]["digest"] == scene.record.manifest_digest.to_string(),
        "{manifest}"
    );
    ensure!(manifest["layers"][0]["mediaType"] == "application/vnd.migrator.image.chunks.index.v1");
    ensure!(manifest["layers"][1]["mediaType"] == "application/vnd.migrator.image.chunks.pack.v1");

    // A second push sends no pack again, and the list does not grow.
    let again = scene
        .origin
        .push(&scene.name(), &scene.name(), &with_chunks())?;
    ensure!(again.transferred_bytes == 0, "{again:?}");
    ensure!(again.chunks == scene.pushed.chunks);
    ensure!(raw(&tag)? == list);
    Ok(())
}

#[test]
fn layers_need_not_be_kept_if_the_registry_has_the_image() -> Result<()> {
    let scene = Scene::new()?;
    // `Scene` pushed without kept layers. Where the image is not, its chunks cannot go.
    let elsewhere = Registry::open()?;
    let to = format!("{}/app:1", elsewhere.address());
    let error = scene
        .origin
        .push(&scene.name(), &to, &with_chunks())
        .expect_err("no image there");
    ensure!(matches!(error, PushError::Kept(_)), "{error:?}");
    ensure!(words(&error).contains("not kept"), "{error}");

    // With kept layers both go.
    let puller = Puller::with("{ keep_layers: true }")?;
    puller.plain(&scene.name())?;
    puller.push(&scene.name(), &to, &with_chunks())?;
    let other = Puller::new()?;
    let chunks = find(&other, &to)?.context("there are chunks")?;
    scene.check_all(&chunks)
}

#[test]
fn an_image_without_chunks_has_none() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    registry.store(&layout(work.path())?, "app:1", &[])?;
    ensure!(find(&puller, &format!("{}/app:1", registry.address()))?.is_none());
    Ok(())
}

#[test]
fn many_readers_share_requests() -> Result<()> {
    let scene = Scene::new()?;
    let puller = Puller::new()?;
    let chunks = find(&puller, &scene.name())?.context("there are chunks")?;
    runtime().block_on(async {
        let reads: Vec<_> = scene
            .record
            .chunks
            .iter()
            .filter(|digest| chunks.has(digest))
            .map(|digest| {
                let (chunks, digest) = (Arc::clone(&chunks), *digest);
                tokio::spawn(async move { (digest, chunks.chunk(&digest, false).await) })
            })
            .collect();
        for read in reads {
            let (digest, bytes) = read.await?;
            let bytes = bytes.map_err(anyhow::Error::msg)?;
            ensure!(Digest::of(&bytes) == digest);
        }
        let unknown = chunks.chunk(&Digest::of(b"another"), false).await;
        ensure!(
            matches!(
                unknown.as_ref().map_err(Arc::as_ref),
                Err(ChunkError::Unknown(_))
            ),
            "{unknown:?}"
        );
        Ok(())
    })
}

#[test]
fn a_token_that_ends_in_the_middle_is_fetched_anew() -> Result<()> {
    const USER: &str = "ann:secret";
    // The registry takes tokens for a minute longer than they say: these are good for a few seconds.
    let server = TokenServer::start(USER, -57)?;
    let registry = Registry::start(&Setup {
        token: Some(&server),
        ..Setup::default()
    })?;
    let work = TempDir::new()?;
    let file = work.path().join("auth.json");
    log_in(&registry, "ann", "secret", &file)?;
    let auth = file.display().to_string();
    registry.store(&layout(work.path())?, "app:1", &["--dest-authfile", &auth])?;
    let puller = Puller::with(&json!({ "auth_file": file }).to_string())?;
    let name = format!("{}/app:1", registry.address());
    let record = puller.plain(&name)?.record;
    puller.push(&name, &name, &with_chunks())?;
    let chunks = find(&puller, &name)?.context("there are chunks")?;
    let before = server.given();
    let digest = record
        .chunks
        .iter()
        .find(|digest| chunks.has(digest))
        .context("a chunk")?;
    let runtime = runtime();
    // Every read is answered, whatever became of the token.
    let mut failed = None;
    let renewed = xtask::process::poll_until(std::time::Duration::from_secs(60), || match runtime
        .block_on(chunks.chunk(digest, false))
    {
        Ok(_) => server.given() > before,
        Err(error) => {
            failed = Some(error);
            true
        }
    });
    ensure!(failed.is_none(), "{failed:?}");
    ensure!(renewed, "the token never ended");
    Ok(())
}
