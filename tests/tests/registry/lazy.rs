//! Images that are used while their chunks still come: pulled lazily, read on demand, filled, also after a restart.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migrator::image::{ImageRecord, ImageStore};
use migrator::registry::{PullOptions, Registries};
use migrator::supply::{Supply, Wanted};
use migrator_tests::registry::{Fault, Registry, Relay};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use xtask::process::poll_until;

use super::chunks::{Scene, layout};
use super::{Puller, plain, runtime};

const COMES_WITHIN: Duration = Duration::from_secs(60);

fn lazily() -> PullOptions {
    PullOptions {
        lazy: true,
        ..plain()
    }
}

/// What a service does with a store: chunks come by the registries.
struct Supplied {
    supply: Supply,
    shutdown: CancellationToken,
    // Last: tasks end with it.
    runtime: Runtime,
}

impl Supplied {
    fn start(store: &Arc<ImageStore>, registries: &Registries) -> Self {
        let (runtime, shutdown) = (runtime(), CancellationToken::new());
        let supply = Supply::new(Arc::clone(store), shutdown.clone(), TaskTracker::new());
        supply.add(registries.source());
        runtime.block_on(async { supply.start() });
        Self {
            supply,
            shutdown,
            runtime,
        }
    }

    fn fill(&self, record: &ImageRecord) {
        let record = Arc::new(record.clone());
        self.runtime.block_on(async { self.supply.fill(&record) });
    }
}

impl Drop for Supplied {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// All of the image is in the store, and as it was pushed.
fn check(scene: &Scene, store: &ImageStore) -> Result<()> {
    let whole = poll_until(COMES_WITHIN, || {
        store.chunks().missing(&scene.record).is_empty()
    });
    ensure!(
        whole,
        "{} chunks are missing",
        store.chunks().missing(&scene.record).len()
    );
    let digest = &scene.record.erofs_digest;
    for index in 0..scene.record.chunks.len() as u32 {
        let (ours, theirs) = (
            store.read_chunk(digest, index)?,
            scene.origin.store.read_chunk(digest, index)?,
        );
        ensure!(ours == theirs, "chunk {index} differs");
    }
    Ok(())
}

#[test]
fn a_lazy_pull_fetches_little_and_the_rest_comes_in_the_background() -> Result<()> {
    let scene = Scene::new()?;
    let relay = Relay::start(scene.registry.address(), Fault::None)?;
    let puller = Puller::new()?;
    let pulled = puller.pull(&format!("{}/app:1", relay.address()), &lazily())?;
    ensure!(
        pulled.lazy && pulled.record.erofs_digest == scene.record.erofs_digest,
        "{pulled:?}"
    );
    ensure!(
        relay.bytes() < scene.record.erofs_size / 8,
        "{} bytes came",
        relay.bytes()
    );
    let missing = puller.store.chunks().missing(&pulled.record).len();
    ensure!(
        missing > pulled.record.chunks.len() / 2,
        "{missing} are missing"
    );

    let supplied = Supplied::start(&puller.store, &puller.registries);
    supplied.fill(&pulled.record);
    check(&scene, &puller.store)?;
    // The image has its name, and a pull of it once more finds it.
    let again = puller.pull(&format!("{}/app:1", relay.address()), &lazily())?;
    ensure!(!again.lazy && again.transferred_bytes == 0, "{again:?}");
    Ok(())
}

#[test]
fn a_chunk_that_is_read_comes_at_once_and_after_a_restart_too() -> Result<()> {
    let scene = Scene::new()?;
    let puller = Puller::new()?;
    let record = puller.pull(&scene.name(), &lazily())?.record;
    let last = record.chunks.len() as u32 - 1;
    let fetch = |puller: &Puller, index| {
        let supplied = Supplied::start(&puller.store, &puller.registries);
        let record = Arc::new(record.clone());
        supplied
            .runtime
            .block_on(supplied.supply.fetch(&Wanted { record, index }))
    };
    fetch(&puller, last)?;
    ensure!(puller.store.chunks().has(&record.chunks[last as usize]));
    // A service that is started anew knows where the image came from, though not from its configuration that there is no TLS.
    let puller = puller.restarted()?;
    fetch(&puller, 5)?;
    let supplied = Supplied::start(&puller.store, &puller.registries);
    check(&scene, &puller.store)?;
    drop(supplied);
    Ok(())
}

#[test]
fn an_image_that_came_otherwise_is_mended_by_its_name() -> Result<()> {
    let scene = Scene::new()?;
    let config = format!("{{ plain_http: ['{}'] }}", scene.registry.address());
    let puller = Puller::with(&config)?;
    let record = puller.plain(&scene.name())?.record;
    let folder = puller.dir.path().join("images/chunks");
    let hex = record.chunks[3].hex();
    let damaged = folder.join(&hex[..2]).join(&hex);
    std::fs::write(&damaged, b"rotten")
        .with_context(|| format!("no chunk at {}", damaged.display()))?;
    let verified = puller.store.verify(&record);
    ensure!(verified.bad().contains(&3), "{verified:?}");
    let supplied = Supplied::start(&puller.store, &puller.registries);
    supplied.fill(&record);
    check(&scene, &puller.store)
}

#[test]
fn an_image_without_chunks_is_pulled_whole_and_it_is_said_why() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    registry.store(&layout(work.path())?, "app:1", &[])?;
    let (pulled, told) = puller.told(&format!("{}/app:1", registry.address()), &lazily());
    let pulled = pulled?;
    ensure!(!pulled.lazy && puller.store.chunks().missing(&pulled.record).is_empty());
    let note = told.note.unwrap_or_default();
    ensure!(
        note.contains("its chunks are not in the registry"),
        "{note}"
    );
    Ok(())
}

#[test]
fn a_registry_that_breaks_off_while_an_image_fills_delays_it_and_no_more() -> Result<()> {
    let scene = Scene::new()?;
    let relay = Relay::start(scene.registry.address(), Fault::Each(900 << 10))?;
    let puller = Puller::new()?;
    let record = puller
        .pull(&format!("{}/app:1", relay.address()), &lazily())?
        .record;
    let supplied = Supplied::start(&puller.store, &puller.registries);
    supplied.fill(&record);
    check(&scene, &puller.store)
}
