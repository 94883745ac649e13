//! Registries that break off, lie, or have too much to do; disks that are full.

use std::time::{Duration, Instant};

use anyhow::Result;
use migrator::image::{ContentError, ImportError};
use migrator::registry::{FetchError, PullError, RequestError};
use migrator_tests::registry::{Fault, Registry, Relay, umoci_image};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::{Puller, oci, plain, words};

/// Megabytes of the image's one layer.
const LAYER: usize = 6;
/// What HTTP and manifests add to the bytes of blobs, at most.
const EXTRA: u64 = 64 << 10;

struct Scene {
    registry: Registry,
    work: TempDir,
    puller: Puller,
}

impl Scene {
    fn new() -> Result<Self> {
        let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
        let layout = umoci_image(work.path(), LAYER)?;
        registry.store(&oci(&layout), "app:1", &[])?;
        Ok(Self {
            registry,
            work,
            puller,
        })
    }

    fn relay(&self, fault: Fault) -> Result<Relay> {
        Relay::start(self.registry.address(), fault)
    }
}

fn app(relay: &Relay) -> String {
    format!("{}/app:1", relay.address())
}

#[test]
fn a_registry_that_breaks_off_is_asked_for_the_rest() -> Result<()> {
    let scene = Scene::new()?;
    let relay = scene.relay(Fault::Once(3 << 20))?;
    let (pulled, progress) = scene.puller.told(&app(&relay), &plain());
    pulled?;
    let note = progress.note.unwrap_or_default();
    assert!(note.contains("breaks off"), "{note}");
    let size: u64 = progress.blobs.iter().map(|blob| blob.size).sum();
    // What was under way when it broke may come twice; a layer from its beginning would be 3 MiB more.
    assert!(
        relay.bytes() < size + (1 << 20),
        "{} of {size}",
        relay.bytes()
    );
    Ok(())
}

#[test]
fn a_new_pull_goes_on_where_one_ended_also_after_a_restart() -> Result<()> {
    let Scene {
        registry,
        work: _work,
        mut puller,
    } = Scene::new()?;
    // Every connection ends before any layer's first megabyte is written; so each pull gives up at some point.
    let relay = Relay::start(registry.address(), Fault::Each(100 << 10))?;
    // The address is a part of the image's name, not of the blob's.
    let (failed, _) = puller.told(&app(&relay), &plain());
    // 100 KiB at a try, and some fifty tries.
    let error = failed.expect_err("it never gets on");
    let came = match &error {
        PullError::Fetch {
            source: FetchError::Incomplete { came, size, .. },
            ..
        } => {
            assert!(*came > 0 && came < size, "{came} of {size}");
            *came
        }
        other => panic!("{other:?}"),
    };
    assert!(
        words(&error).contains("a new pull goes on from there"),
        "{error}"
    );
    assert!(puller.store.list().is_empty());

    puller = puller.restarted()?;
    let relay = Relay::start(registry.address(), Fault::None)?;
    let (pulled, progress) = puller.told(&app(&relay), &plain());
    pulled?;
    let size: u64 = progress.blobs.iter().map(|blob| blob.size).sum();
    assert!(
        relay.bytes() < size - came + EXTRA,
        "{} of {size}",
        relay.bytes()
    );
    assert!(puller.content("partial")?.is_empty());
    Ok(())
}

#[test]
fn a_tampered_layer_is_never_used() -> Result<()> {
    let scene = Scene::new()?;
    let relay = scene.relay(Fault::Flip(4 << 20))?;
    let error = scene
        .puller
        .plain(&app(&relay))
        .expect_err("a byte is another");
    assert!(
        matches!(
            &error,
            PullError::Fetch {
                source: FetchError::Content(ContentError::Tampered { .. }),
                ..
            }
        ),
        "{error:?}"
    );
    assert!(scene.puller.store.list().is_empty());
    assert!(scene.puller.content("partial")?.is_empty());
    // The registry itself is honest.
    scene
        .puller
        .plain(&format!("{}/app:1", scene.registry.address()))?;
    Ok(())
}

#[test]
fn a_part_that_was_damaged_on_the_disk_is_fetched_anew() -> Result<()> {
    let scene = Scene::new()?;
    let relay = scene.relay(Fault::Each(100 << 10))?;
    scene
        .puller
        .plain(&app(&relay))
        .expect_err("it never gets on");
    let partial = scene.puller.dir.path().join("images/content/partial");
    for entry in std::fs::read_dir(partial)? {
        let path = entry?.path();
        let mut bytes = std::fs::read(&path)?;
        bytes[0] ^= 1;
        std::fs::write(&path, bytes)?;
    }
    let name = format!("{}/app:1", scene.registry.address());
    let (pulled, progress) = scene.puller.told(&name, &plain());
    pulled?;
    let note = progress.note.unwrap_or_default();
    assert!(note.contains("is damaged: it is fetched anew"), "{note}");
    Ok(())
}

#[test]
fn a_pause_that_the_registry_asks_for_is_kept() -> Result<()> {
    let scene = Scene::new()?;
    let relay = scene.relay(Fault::Busy(2))?;
    let begun = Instant::now();
    scene.puller.plain(&app(&relay))?;
    assert_eq!(relay.refused(), 2);
    assert!(
        begun.elapsed() >= Duration::from_secs(2),
        "each asks for a second"
    );
    // And it is not kept for ever.
    let relay = scene.relay(Fault::Busy(u64::MAX))?;
    let error = scene
        .puller
        .plain(&app(&relay))
        .expect_err("never its turn");
    assert!(
        matches!(error.request(), Some(RequestError::Busy { .. })),
        "{error:?}"
    );
    Ok(())
}

#[test]
fn what_is_not_there_is_named() -> Result<()> {
    let scene = Scene::new()?;
    let address = scene.registry.address();
    let missing = |name: &str| {
        let error = scene.puller.plain(name).expect_err("it is not there");
        assert!(
            matches!(error.request(), Some(RequestError::Missing { .. })),
            "{error:?}"
        );
        words(&error)
    };
    assert!(missing(&format!("{address}/app:9")).contains("manifest of `9`"));
    assert!(missing(&format!("{address}/other:1")).contains("no manifest"));

    let error = scene
        .puller
        .plain("no-such-registry.invalid/app:1")
        .expect_err("no such host");
    assert!(
        matches!(error.request(), Some(RequestError::NoHost { .. })),
        "{error:?}"
    );

    // A blob that the manifest names, and that is gone.
    let (_, progress) = scene.puller.told(&format!("{address}/app:1"), &plain());
    let layer = progress
        .blobs
        .iter()
        .max_by_key(|blob| blob.size)
        .expect("a layer");
    let puller = Puller::new()?;
    scene.registry.lose(&layer.digest)?;
    let error = puller
        .plain(&format!("{address}/app:1"))
        .expect_err("a layer is gone");
    assert!(words(&error).contains(&layer.digest), "{error}");
    assert!(puller.store.list().is_empty());
    Ok(())
}

/// A tmpfs that ends with its guard.
struct Disk(std::path::PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

#[test]
fn a_full_disk_is_named_and_nothing_half_is_left() -> Result<()> {
    let scene = Scene::new()?;
    // The first has no room for the layer, the second none for what it unpacks to.
    for size in ["4m", "10m"] {
        let puller = Puller::new()?;
        let images = puller.dir.path().join("images");
        let options = format!("size={size}");
        mount(
            Some("none"),
            &images,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        let _disk = Disk(images);
        let puller = puller.restarted()?;
        let name = format!("{}/app:1", scene.registry.address());
        let error = puller.plain(&name).expect_err("there is no room");
        let named = match &error {
            PullError::Fetch {
                source: FetchError::Content(ContentError::DiskFull { .. }),
                ..
            } => size == "4m",
            PullError::Import { source, .. } => {
                matches!(**source, ImportError::DiskFull { .. }) && size == "10m"
            }
            _ => false,
        };
        assert!(named, "{size}: {error:?}");
        // The layer gives its room back; of the small ones beside it a beginning may stay.
        let left: u64 = puller.content("partial")?.iter().sum();
        assert!(left < EXTRA, "{left}");
        assert!(puller.store.list().is_empty());
    }
    drop(scene.work);
    Ok(())
}
