//! An image of many GiB, which is little on the disk: most of it is one and the same chunk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use migrator::api::types::{ImageInfo, PodDetail};
use migrator::image::{CHUNK_SIZE, Digest, ImageRecord};
use migrator_tests::lab::{POD, SOON, TestLab};
use xtask::demo_image;
use xtask::lab::Node;
use xtask::process::poll_until;

/// Chunks of the image: 5 GiB.
const CHUNKS: usize = 20_480;

fn file(images: &Path, chunk: &Digest) -> PathBuf {
    let hex = chunk.hex();
    images.join("chunks").join(&hex[..2]).join(hex)
}

fn put(images: &Path, bytes: &[u8]) -> Result<Digest> {
    let digest = Digest::of(bytes);
    let path = file(images, &digest);
    fs::create_dir_all(path.parent().context("a chunk without a folder")?)?;
    fs::write(path, bytes)?;
    Ok(digest)
}

/// Puts zeros behind the files of the demo's image in the store of a node that does not run.
fn enlarge(images: &Path) -> Result<()> {
    let names = images.join("names.json");
    let mut known: BTreeMap<String, Digest> = serde_json::from_slice(&fs::read(&names)?)?;
    let id = known
        .get_mut(demo_image::REFERENCE)
        .context("the demo's image is not there")?;
    let folder = images.join(id.hex());
    let mut record: ImageRecord = serde_json::from_slice(&fs::read(folder.join("record.json"))?)?;
    let last = record.chunks.pop().context("an image without chunks")?;
    let mut bytes = fs::read(file(images, &last))?;
    bytes.resize(CHUNK_SIZE as usize, 0);
    record.chunks.push(put(images, &bytes)?);
    let zeros = put(images, &vec![0; CHUNK_SIZE as usize])?;
    record.chunks.resize(CHUNKS, zeros);
    record.erofs_size = CHUNKS as u64 * u64::from(CHUNK_SIZE);
    record.erofs_digest =
        ImageRecord::digest_of(record.erofs_size, record.chunk_size, &record.chunks);
    record.validate()?;
    fs::remove_dir_all(&folder)?;
    *id = record.id();
    let folder = images.join(id.hex());
    fs::create_dir(&folder)?;
    fs::write(folder.join("record.json"), serde_json::to_vec(&record)?)?;
    Ok(fs::write(names, serde_json::to_vec(&known)?)?)
}

fn is_whole(test: &TestLab, node: Node) -> Result<()> {
    let mut last: Option<ImageInfo> = None;
    let whole = poll_until(SOON, || {
        let pod: Result<PodDetail> = test.get(node, &format!("/v1/pods/{POD}"));
        last = pod.ok().and_then(|pod| pod.images.into_iter().next());
        last.as_ref()
            .is_some_and(|image| image.here_bytes == image.size_bytes)
    });
    ensure!(whole, "the image does not come: {last:?}");
    let size = last.map_or(0, |image| image.size_bytes);
    ensure!(size == 5 << 30, "the image has {size} bytes");
    Ok(())
}

#[test]
fn a_pod_whose_lists_of_chunks_fit_no_single_message_moves() -> Result<()> {
    let mut test = TestLab::up()?;
    test.import_demo(Node::A)?;
    test.restart(Node::A, || enlarge(&test.state(Node::A).join("images")))?;
    // Imported once more it would be the same: it goes by its manifest.
    test.run_pod()?;
    test.moves(Node::A)?;
    is_whole(&test, Node::B)?;
    test.exec_works(Node::B)?;
    // The other way, to a node that has nothing of it any more, and all of it before the grant.
    test.succeeds(Node::A, &["image", "rm", demo_image::REFERENCE])?;
    test.moves_with(Node::B, &["--images", "complete"])?;
    is_whole(&test, Node::A)?;
    test.exec_works(Node::A)?;
    test.end()
}
