//! Filling an image while the disk is full.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use migrator::block::ReadOnly;
use migrator::image::{Digest, ImageRecord, ImageStore};
use migrator::supply::{ChunkSource, SourceError, Supply, Wanted};
use nix::mount::{MsFlags, mount};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use xtask::process::poll_until;

use super::{Mount, umoci_image};

/// Chunks of another store, as a node has them that is not far away.
#[derive(Debug)]
struct Neighbour(ImageStore);

impl ChunkSource for Neighbour {
    fn address<'a>(&'a self, _wanted: &'a Wanted) -> futures::future::BoxFuture<'a, String> {
        Box::pin(std::future::ready("neighbour".to_owned()))
    }

    fn fetch<'a>(
        &'a self,
        wanted: &'a Wanted,
        _urgent: bool,
    ) -> futures::future::BoxFuture<'a, Result<Option<bytes::Bytes>, SourceError>> {
        Box::pin(async { Ok(self.0.chunks().read_known(&wanted.digest())) })
    }
}

/// Filling goes on, or is seen to wait.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn a_disk_that_is_full_holds_up_the_filling_and_not_the_reader() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let _within = runtime.enter();
    let folder = TempDir::new()?;
    let layout = umoci_image(folder.path(), |root| {
        let data: Vec<u8> = (0..24_u32 << 18)
            .flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes())
            .collect();
        fs::create_dir_all(root.join("etc"))?;
        fs::write(root.join("etc/passwd"), "app:x:77:78::/:/bin/sh\n")?;
        Ok(fs::write(root.join("large"), data)?)
    })?;
    let there = ImageStore::open(&folder.path().join("there"))?;
    let record = Arc::new(there.import(&layout, Some("app:1"))?);
    let small = folder.path().join("small");
    fs::create_dir(&small)?;
    // Filling leaves 32 MiB to others: there is room for a third of the image.
    let _disk = Mount::tmpfs(&small, "40m")?;
    let here = Arc::new(ImageStore::open(&small.join("images"))?);
    here.adopt(ImageRecord::clone(&record))?;
    let supply = Supply::new(
        Arc::clone(&here),
        CancellationToken::new(),
        TaskTracker::new(),
    );
    supply.add(Arc::new(Neighbour(there)));
    supply.start();
    let holds_up = |supply: &Supply| {
        let problem = supply.problem(&record.erofs_digest);
        problem.is_some_and(|problem| problem.contains("disk is nearly full"))
    };
    let full = poll_until(SOON, || holds_up(&supply));
    ensure!(full, "the disk does not become full");
    let lacking = here.chunks().missing(&record).len();
    ensure!(
        lacking > record.chunks.len() / 2,
        "{lacking} chunks are missing"
    );
    // Not a byte is left for what is read now.
    let rest = nix::sys::statvfs::statvfs(&small)?;
    let rest = rest.blocks_available() * rest.fragment_size();
    fs::write(small.join("rest"), vec![1; usize::try_from(rest)?])?;
    let export = here.export(&record.erofs_digest, PathBuf::from("i0"))?;
    let mut bytes = vec![0; usize::try_from(record.erofs_size)?];
    export.read_at(&mut bytes, 0)?;
    for (chunk, digest) in bytes.chunks(record.chunk_size as usize).zip(&record.chunks) {
        ensure!(Digest::of(chunk) == *digest, "a wrong chunk was served");
    }
    // There is room again.
    let larger = Some("size=128m");
    mount(
        Some("none"),
        &small,
        Some("tmpfs"),
        MsFlags::MS_REMOUNT,
        larger,
    )?;
    let complete = poll_until(SOON, || here.chunks().missing(&record).is_empty());
    ensure!(complete, "filling does not go on");
    ensure!(
        here.verify(&record).is_whole(),
        "what was filled is damaged"
    );
    Ok(())
}
