//! Registries that break off, lie, or have lost something, while chunks are read from them: nothing wrong is ever given, and what can
//! be had is had.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use migrator::image::Digest;
use migrator::registry::chunks::{ChunkError, RemoteChunks};
use migrator::registry::{PullError, RequestError};
use migrator_tests::registry::{Fault, Liar, Relay, answer};
use serde_json::{Value, json};

use super::chunks::{Scene, find};
use super::{Puller, runtime, words};

/// The first chunk that is stored.
fn first(scene: &Scene, chunks: &RemoteChunks) -> Result<Digest> {
    let mut all = scene.record.chunks.iter();
    all.find(|digest| chunks.has(digest))
        .copied()
        .context("a chunk")
}

fn read(chunks: &Arc<RemoteChunks>, digest: &Digest) -> Result<(), Arc<ChunkError>> {
    let bytes = runtime().block_on(chunks.chunk(digest, false))?;
    assert_eq!(Digest::of(&bytes), *digest, "never anything else");
    Ok(())
}

/// A pull through a relay: the image's name is the relay's.
fn through(scene: &Scene, relay: &Relay) -> Result<(Puller, Arc<RemoteChunks>)> {
    ensure!(scene.registry.address() != relay.address());
    let puller = Puller::new()?;
    let chunks =
        find(&puller, &format!("{}/app:1", relay.address()))?.context("there are chunks")?;
    Ok((puller, chunks))
}

/// The bytes that manifests and index take: what a fault is counted from.
fn preface(scene: &Scene) -> Result<u64> {
    let relay = Relay::start(scene.registry.address(), Fault::None)?;
    through(scene, &relay)?;
    Ok(relay.bytes())
}

#[test]
fn a_registry_that_breaks_off_is_asked_for_the_rest_of_the_chunks() -> Result<()> {
    let scene = Scene::new()?;
    let before = preface(&scene)?;
    let relay = Relay::start(scene.registry.address(), Fault::Once(before + (1 << 20)))?;
    let (_puller, chunks) = through(&scene, &relay)?;
    scene.check_all(&chunks)?;
    // And one that ends every connection in the middle of a chunk's neighbour.
    let relay = Relay::start(scene.registry.address(), Fault::Each(600 << 10))?;
    let (_puller, chunks) = through(&scene, &relay)?;
    scene.check_all(&chunks)
}

#[test]
fn one_that_breaks_off_in_every_chunk_is_given_up_and_named() -> Result<()> {
    let scene = Scene::new()?;
    let relay = Relay::start(scene.registry.address(), Fault::Each(100 << 10))?;
    let (_puller, chunks) = through(&scene, &relay)?;
    // The image's noise: a chunk that does not compress.
    let digest = scene.record.chunks[4];
    let error = read(&chunks, &digest).expect_err("it never comes in full");
    ensure!(matches!(&*error, ChunkError::Request { .. }), "{error:?}");
    ensure!(
        words(&*error).contains(relay.address()),
        "{}",
        words(&*error)
    );
    Ok(())
}

#[test]
fn a_byte_that_changed_on_the_way_is_asked_for_again() -> Result<()> {
    let scene = Scene::new()?;
    let before = preface(&scene)?;
    let relay = Relay::start(scene.registry.address(), Fault::Flip(before + (1 << 20)))?;
    let (_puller, chunks) = through(&scene, &relay)?;
    scene.check_all(&chunks)
}

/// What the registry answers to a request of this path, all of it. It is asked for no ranges.
fn honest(registry: &str, path: &str) -> Vec<u8> {
    let ask = || -> Result<Vec<u8>> {
        let mut to = TcpStream::connect(registry)?;
        let accept =
            "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json";
        write!(
            to,
            "GET {path} HTTP/1.1\r\nHost: {registry}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
        )?;
        let mut all = Vec::new();
        to.read_to_end(&mut all)?;
        Ok(all)
    };
    ask().unwrap_or_default()
}

/// A server that is honest but for blobs of packs.
fn liar(
    scene: &Scene,
    lie: impl Fn(Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
) -> Result<(Liar, Vec<String>)> {
    let packs = packs(scene)?;
    let (registry, known) = (scene.registry.address().to_owned(), packs.clone());
    let liar = Liar::start(move |path, _| {
        let whole = honest(&registry, path);
        match known.iter().any(|pack| path.contains(pack.as_str())) {
            true => lie(whole),
            false => whole,
        }
    })?;
    Ok((liar, packs))
}

/// Digests of the packs.
fn packs(scene: &Scene) -> Result<Vec<String>> {
    let artifact = scene
        .pushed
        .chunks
        .as_ref()
        .context("chunks were pushed")?
        .artifact;
    let answer = honest(
        scene.registry.address(),
        &format!("/v2/app/manifests/{artifact}"),
    );
    let text = String::from_utf8(answer)?;
    let (_, body) = text.split_once("\r\n\r\n").context("no body")?;
    let manifest: Value = serde_json::from_str(body)?;
    let layers = manifest["layers"]
        .as_array()
        .context("no layers")?
        .iter()
        .skip(1);
    layers
        .map(|layer| Ok(layer["digest"].as_str().context("no digest")?.to_owned()))
        .collect()
}

fn nonsense(error: &ChunkError) -> bool {
    matches!(
        error,
        ChunkError::Request {
            source: RequestError::Nonsense { .. },
            ..
        }
    )
}

#[test]
fn answers_that_are_not_the_part_that_was_asked_for_are_refused() -> Result<()> {
    let scene = Scene::new()?;
    let other = |range: &str| {
        let head = format!("Content-Range: bytes {range}\r\n");
        move |_: Vec<u8>| answer("206 Partial Content", &head, "abcd")
    };
    let check = |liar: &Liar, said: &str| -> Result<()> {
        let puller = Puller::new()?;
        let chunks =
            find(&puller, &format!("{}/app:1", liar.address()))?.context("there are chunks")?;
        let error = read(&chunks, &first(&scene, &chunks)?).expect_err("it lies");
        ensure!(nonsense(&error), "{error:?}");
        ensure!(words(&*error).contains(said), "{}", words(&*error));
        Ok(())
    };
    // All of the blob, with 200.
    check(
        &liar(&scene, |whole| whole)?.0,
        "where a part was asked for",
    )?;
    // Another part; no word on which part; a part of another blob.
    check(&liar(&scene, other("1-4/100"))?.0, "another part")?;
    check(
        &liar(&scene, |_| answer("206 Partial Content", "", "abcd"))?.0,
        "another part",
    )?;
    check(&liar(&scene, other("0-3/4"))?.0, "another part")?;
    Ok(())
}

#[test]
fn wrong_bytes_are_never_given_and_the_next_host_is_asked() -> Result<()> {
    let scene = Scene::new()?;
    // It answers each request for a part rightly, but for the bytes.
    let registry = scene.registry.address();
    let tampering = Relay::start(registry, Fault::Parts)?;
    let puller = Puller::new()?;
    let alone =
        find(&puller, &format!("{}/app:1", tampering.address()))?.context("there are chunks")?;
    let digest = first(&scene, &alone)?;
    let error = read(&alone, &digest).expect_err("it lies");
    ensure!(matches!(&*error, ChunkError::Damaged { .. }), "{error:?}");
    ensure!(
        words(&*error).contains(tampering.address()),
        "{}",
        words(&*error)
    );

    // As a mirror it costs time, and nothing else.
    let mirrors = json!({ "mirrors": { registry: [format!("http://{}", tampering.address())] } });
    let puller = Puller::with(&mirrors.to_string())?;
    let chunks = find(&puller, &scene.name())?.context("there are chunks")?;
    ensure!(chunks.host() == tampering.address(), "{}", chunks.host());
    scene.check_all(&chunks)
}

#[test]
fn a_mirror_without_the_chunks_is_no_reason_to_do_without_them() -> Result<()> {
    let scene = Scene::new()?;
    let mirror = migrator_tests::registry::Registry::open()?;
    let source = format!("docker://{}", scene.name());
    mirror.store(&source, "app:1", &["--src-tls-verify=false"])?;
    let mirrors = json!({ "mirrors": { scene.registry.address(): [format!("http://{}", mirror.address())] } });
    let puller = Puller::with(&mirrors.to_string())?;
    let chunks = find(&puller, &scene.name())?.context("the registry itself has them")?;
    ensure!(
        chunks.host() == scene.registry.address(),
        "{}",
        chunks.host()
    );
    scene.check_all(&chunks)
}

#[test]
fn a_pack_that_is_gone_is_named() -> Result<()> {
    let scene = Scene::new()?;
    let puller = Puller::new()?;
    let chunks = find(&puller, &scene.name())?.context("there are chunks")?;
    let pack = packs(&scene)?.remove(0);
    scene.registry.lose(&pack)?;
    let error = read(&chunks, &first(&scene, &chunks)?).expect_err("it is gone");
    let missing = matches!(
        &*error,
        ChunkError::Request {
            source: RequestError::Missing { .. },
            ..
        }
    );
    ensure!(missing, "{error:?}");
    ensure!(words(&*error).contains(&pack), "{}", words(&*error));
    Ok(())
}

#[test]
fn an_index_that_was_tampered_with_is_not_used() -> Result<()> {
    let scene = Scene::new()?;
    let artifact = scene
        .pushed
        .chunks
        .as_ref()
        .context("chunks were pushed")?
        .artifact;
    let registry = scene.registry.address().to_owned();
    // The manifest is another than its digest says; then it is a rightful one of another image.
    let liar = Liar::start(move |path, _| {
        let whole = honest(&registry, path);
        match path.contains(&artifact.hex()) {
            true => String::from_utf8_lossy(&whole)
                .replace("chunks.pack", "chunks.pick")
                .into_bytes(),
            false => whole,
        }
    })?;
    let puller = Puller::new()?;
    let error = find(&puller, &format!("{}/app:1", liar.address())).expect_err("it lies");
    ensure!(matches!(error, PullError::Chunks { .. }), "{error:?}");
    ensure!(
        words(&error).contains("another manifest"),
        "{}",
        words(&error)
    );
    ensure!(puller.is_empty()?);
    Ok(())
}
