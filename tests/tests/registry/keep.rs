//! Kept layers: pushed, saved, and cleared away when nobody needs them.

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use migrator::image::{Digest, ImageStore, KeptError, SaveError};
use migrator::registry::{PullOptions, PushError, PushOptions, RequestError};
use migrator_tests::registry::{Fault, Registry, Relay, Setup, log_in, umoci_image};
use tempfile::TempDir;
use xtask::cmd;

use super::{Puller, oci, plain, words};

fn keeping() -> PullOptions {
    PullOptions {
        keep_layers: true,
        ..plain()
    }
}

fn to_plain() -> PushOptions {
    PushOptions {
        plain_http: true,
        ..PushOptions::default()
    }
}

/// What skopeo finds in a registry.
fn manifest_digest(name: &str) -> Result<Digest> {
    let mut inspect = cmd::command("skopeo", ["inspect", "--tls-verify=false", "--raw"]);
    let raw = cmd::output(inspect.arg(format!("docker://{name}")))?;
    Ok(Digest::of(raw.as_bytes()))
}

#[test]
fn a_pushed_image_is_what_was_pulled_and_is_sent_once() -> Result<()> {
    let (from, to, work) = (Registry::open()?, Registry::open()?, TempDir::new()?);
    let puller = Puller::new()?;
    let layout = umoci_image(work.path(), 2)?;
    from.store(&oci(&layout), "app:1", &[])?;
    let name = format!("{}/app:1", from.address());
    let pulled = puller.pull(&name, &keeping())?;

    let target = format!("{}/team/copy:2", to.address());
    let pushed = puller.push(&name, &target, &to_plain())?;
    assert_eq!(pushed.digest, pulled.record.manifest_digest);
    assert_eq!(manifest_digest(&target)?, pushed.digest);
    assert_eq!(pushed.transferred_bytes, pulled.transferred_bytes);
    // Another tool reads all of it.
    let copy = format!("oci:{}:copy", work.path().join("copy").display());
    let mut read = cmd::command("skopeo", ["copy", "--quiet", "--src-tls-verify=false"]);
    cmd::output(read.args([format!("docker://{target}"), copy]))?;

    let again = puller.push(&name, &target, &to_plain())?;
    assert_eq!(again.transferred_bytes, 0);
    // A link that breaks once while it answers.
    let relay = Relay::start(to.address(), Fault::Once(100))?;
    let other = format!("{}/third:1", relay.address());
    puller.push(&name, &other, &to_plain())?;
    assert_eq!(
        manifest_digest(&format!("{}/third:1", to.address()))?,
        pushed.digest
    );
    Ok(())
}

#[test]
fn a_push_shows_its_credentials_and_needs_a_tag() -> Result<()> {
    let registry = Registry::start(&Setup {
        password: Some(("ann", "secret")),
        ..Setup::default()
    })?;
    let (work, puller) = (TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 1)?;
    let digest = puller.store.import(&layout, Some("mine"))?.manifest_digest;
    puller.store.keep(&layout, digest)?;
    let target = format!("{}/app:1", registry.address());
    let error = puller
        .push("mine", &target, &to_plain())
        .expect_err("nothing was shown");
    assert!(
        matches!(
            &error,
            PushError::Request {
                source: RequestError::Unauthorized { shown: false, .. },
                ..
            }
        ),
        "{error:?}"
    );
    let file = work.path().join("auth.json");
    log_in(&registry, "ann", "secret", &file)?;
    let options = PushOptions {
        auth_file: Some(file),
        ..to_plain()
    };
    assert_eq!(puller.push("mine", &target, &options)?.digest, digest);
    let pinned = format!("{}/app@{digest}", registry.address());
    let error = puller
        .push("mine", &pinned, &options)
        .expect_err("a digest");
    assert!(matches!(error, PushError::Pinned(..)), "{error:?}");
    Ok(())
}

#[test]
fn a_saved_image_is_read_by_others_and_loads_as_the_same() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 2)?;
    registry.store(&oci(&layout), "app:1", &[])?;
    let name = format!("{}/app:1", registry.address());
    let pulled = puller.pull(&name, &keeping())?.record;

    let file = work.path().join("app.tar");
    let size = puller.store.save(&name, &file)?;
    assert_eq!(size, fs::metadata(&file)?.len());
    let error = puller.store.save(&name, &file).expect_err("it is there");
    assert!(matches!(error, SaveError::Exists(_)), "{error:?}");
    let archive = format!("oci-archive:{}", file.display());
    let folder = format!("dir:{}", work.path().join("read").display());
    cmd::output(&mut cmd::command(
        "skopeo",
        ["copy", "--quiet", &archive, &folder],
    ))?;

    let other = ImageStore::open(&work.path().join("other"))?;
    let loaded = other.import(&file, None)?;
    assert_eq!(loaded.name, name);
    assert_eq!(loaded.manifest_digest, pulled.manifest_digest);
    assert_eq!(loaded.erofs_digest, pulled.erofs_digest);

    // A blob that the disk has changed is not passed on.
    let folder = puller.dir.path().join("images/content/blobs");
    let layer = fs::read_dir(folder)?
        .filter_map(Result::ok)
        .max_by_key(|entry| entry.metadata().map_or(0, |metadata| metadata.len()))
        .context("a layer")?
        .path();
    let mut bytes = fs::read(&layer)?;
    bytes[1000] ^= 1;
    fs::write(&layer, bytes)?;
    let second = work.path().join("second.tar");
    let error = puller
        .store
        .save(&name, &second)
        .expect_err("it is damaged");
    assert!(matches!(error, SaveError::Damaged { .. }), "{error:?}");
    assert!(!second.exists());
    Ok(())
}

#[test]
fn layers_that_are_not_kept_are_said_to_be_so() -> Result<()> {
    let (work, puller) = (TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 1)?;
    let record = puller.store.import(&layout, Some("mine"))?;
    let file = work.path().join("mine.tar");
    let error = puller.store.save("mine", &file).expect_err("no layers");
    assert!(
        matches!(error, SaveError::Kept(KeptError::NotKept(_))),
        "{error:?}"
    );
    let error = puller
        .push("mine", "127.0.0.1:1/app:1", &to_plain())
        .expect_err("no layers");
    assert!(words(&error).contains("are not kept"), "{error}");
    puller.store.keep(&layout, record.manifest_digest)?;
    puller.store.save("mine", &file)?;
    // An archive of docker has no manifest to keep.
    let docker = work.path().join("docker.tar");
    let target = format!("docker-archive:{}:mine:1", docker.display());
    cmd::output(&mut cmd::command(
        "skopeo",
        ["copy", "--quiet", &oci(&layout), &target],
    ))?;
    let record = puller.store.import(&docker, Some("other"))?;
    let error = puller.store.keep(&docker, record.manifest_digest);
    assert!(error.is_err_and(|error| words(&error).contains("docker archive")));
    Ok(())
}

#[test]
fn layers_that_another_image_keeps_stay() -> Result<()> {
    let (registry, work, puller) = (Registry::open()?, TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 1)?;
    registry.store(&oci(&layout), "app:1", &[])?;
    registry.store(&oci(&layout), "docker:1", &["--format", "v2s2"])?;
    let kept = format!("{}/app:1", registry.address());
    puller.pull(&kept, &keeping())?;
    // The same layer, in an image whose layers are not to be kept.
    let (other, progress) = puller.told(&format!("{}/docker:1", registry.address()), &plain());
    other?;
    let largest = progress.blobs.iter().map(|blob| blob.size).max();
    assert!(
        progress.transferred_bytes < largest.context("a layer")?,
        "the layer is here already"
    );
    puller.store.save(&kept, &work.path().join("app.tar"))?;
    Ok(())
}

#[test]
fn what_nobody_needs_is_cleared_away_and_nothing_else() -> Result<()> {
    let (registry, mut puller) = (Registry::open()?, Puller::new()?);
    let (mut names, mut records) = (Vec::new(), Vec::new());
    for tag in ["used", "leased", "held", "free"] {
        let work = TempDir::new()?;
        let layout = umoci_image(work.path(), 1)?;
        registry.store(&oci(&layout), &format!("app:{tag}"), &[])?;
        let name = format!("{}/app:{tag}", registry.address());
        records.push(puller.pull(&name, &keeping())?.record);
        names.push(name);
    }
    let used = || vec![records[0].erofs_digest];
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    puller.store.lease(&names[1], now, hour)?;
    let free = records[3].clone();

    let before = puller.content("blobs")?.len();
    let hold = puller.store.hold([records[2].erofs_digest]);
    let planned = puller.store.collect(used, now, true)?;
    assert_eq!(planned.images, [free]);
    assert_eq!(puller.store.list().len(), 4);
    assert_eq!(
        puller.content("blobs")?.len(),
        before,
        "nothing goes by a dry run"
    );
    let gone = puller.store.collect(used, now, false)?;
    assert_eq!(gone, planned);
    assert_eq!(puller.content("blobs")?.len(), before - gone.blobs.len());
    assert!(puller.store.resolve(&names[3]).is_err());
    let error = puller.store.remove(&names[2], &[]);
    assert!(error.is_err(), "somebody is about to use it");
    drop(hold);

    // Leases outlive the service, holds do not.
    puller = puller.restarted()?;
    let gone = puller.store.collect(used, now + hour / 2, false)?;
    assert_eq!(gone.images, [records[2].clone()]);
    assert!(
        puller
            .store
            .leased_until(&records[1], now + hour / 2)
            .is_some()
    );
    let gone = puller.store.collect(used, now + 2 * hour, false)?;
    assert_eq!(gone.images, [records[1].clone()]);
    puller
        .store
        .save(&names[0], &puller.dir.path().join("used.tar"))?;
    let gone = puller.store.collect(Vec::new, now + 2 * hour, false)?;
    assert_eq!(gone.images, [records[0].clone()]);
    assert!(puller.is_empty()?);
    Ok(())
}
