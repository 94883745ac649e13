use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::noise;
use crate::image::digest::Digest;
use crate::image::incoming::{HandoverError, Incoming};
use crate::image::record::{BadRecord, CHUNK_SIZE, ImageConfig, ImageRecord};
use crate::image::store::{ImageStore, StoreError};
use crate::image::store_files::EROFS;

pub(super) const CHUNK: usize = CHUNK_SIZE as usize;

pub(super) fn record(name: &str, bytes: &[u8]) -> ImageRecord {
    let chunks: Vec<Digest> = bytes.chunks(CHUNK).map(Digest::of).collect();
    let size = bytes.len() as u64;
    ImageRecord {
        name: name.into(),
        manifest_digest: Digest::of(name.as_bytes()),
        config: ImageConfig::default(),
        erofs_size: size,
        chunk_size: CHUNK_SIZE,
        erofs_digest: ImageRecord::digest_of(size, CHUNK_SIZE, &chunks),
        chunks,
    }
}

pub(super) struct Node {
    pub(super) folder: tempfile::TempDir,
    pub(super) store: Arc<ImageStore>,
}

impl Node {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(ImageStore::open(&folder.path().join("images")).unwrap());
        Self { folder, store }
    }

    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> ImageRecord {
        let scratch = self.store.scratch().unwrap();
        for chunk in bytes.chunks(CHUNK) {
            self.store.chunks().put(&Digest::of(chunk), chunk).unwrap();
        }
        self.store
            .commit(scratch, record(name, bytes), true)
            .unwrap()
            .0
    }

    /// An image as earlier versions kept it; the store sees it when it is opened again.
    pub(super) fn put_file(&self, record: &ImageRecord, bytes: &[u8]) {
        let folder = self.folder.path().join("images").join(record.id().hex());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(EROFS), bytes).unwrap();
        let json = serde_json::to_vec(record).unwrap();
        fs::write(folder.join("record.json"), json).unwrap();
    }

    /// The file of a chunk.
    fn file(&self, chunk: &Digest) -> PathBuf {
        let hex = chunk.hex();
        self.store.chunks().root().join(&hex[..2]).join(hex)
    }

    /// How many chunks there are, of whatever image.
    pub(super) fn chunks(&self) -> usize {
        let folders = fs::read_dir(self.store.chunks().root()).unwrap();
        let folders = folders.map(|entry| entry.unwrap().path());
        let folders = folders.filter(|path| !path.ends_with("bad"));
        folders
            .map(|path| fs::read_dir(path).unwrap().count())
            .sum()
    }

    pub(super) fn reopen(self) -> Self {
        let Self { folder, store } = self;
        drop(store);
        let store = Arc::new(ImageStore::open(&folder.path().join("images")).unwrap());
        Self { folder, store }
    }

    /// Names of what is in the store's folder, but for its own files.
    fn folders(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path().join("images")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| !["lock", "names.json", "content", "chunks"].contains(&name.as_str()))
            .collect()
    }

    pub(super) fn bytes(&self, record: &ImageRecord) -> Vec<u8> {
        let read = |index| self.store.read_chunk(&record.erofs_digest, index).unwrap();
        let indices = 0..record.chunks.len() as u32;
        indices.flat_map(|index| read(index).to_vec()).collect()
    }
}

/// Five chunks: two of them equal, the last one short.
pub(super) fn image() -> Vec<u8> {
    let mut bytes = noise(1, 2 * CHUNK);
    bytes.extend_from_slice(&noise(2, CHUNK));
    bytes.extend_from_slice(&noise(2, CHUNK));
    bytes.extend_from_slice(&noise(3, 8192));
    bytes
}

#[test]
fn only_missing_chunks_travel_and_the_bytes_are_the_same() {
    let (source, destination) = (Node::new(), Node::new());
    let record = source.put("redis:7", &image());
    let mut similar = image();
    similar[CHUNK + 5] ^= 1;
    destination.put("redis:6", &similar);

    let (incoming, missing) = Incoming::begin(&destination.store, record.clone()).unwrap();
    assert_eq!(missing, [1]);
    let chunk = source.store.read_chunk(&record.erofs_digest, 1).unwrap();
    incoming.place_digest(&record.chunks[1], &chunk).unwrap();
    // Once more does no harm.
    incoming.place(1, &chunk).unwrap();
    assert!(incoming.missing().is_empty());
    let finished = incoming.finish().unwrap();
    assert_eq!(finished, record);
    let destination = destination.reopen();
    assert_eq!(destination.store.resolve("redis:7").unwrap(), record);
    assert_eq!(destination.bytes(&record), image());
}

#[test]
fn equal_chunks_are_asked_for_once() {
    let (source, destination) = (Node::new(), Node::new());
    let record = source.put("a:1", &image());
    let (incoming, missing) = Incoming::begin(&destination.store, record.clone()).unwrap();
    assert_eq!(missing, [0, 1, 2, 4]);
    for index in missing {
        let chunk = source
            .store
            .read_chunk(&record.erofs_digest, index)
            .unwrap();
        incoming.place(index, &chunk).unwrap();
    }
    incoming.finish().unwrap();
    assert_eq!(destination.bytes(&record), image());
}

#[test]
fn an_image_that_is_here_needs_nothing() {
    let node = Node::new();
    let record = node.put("a:1", &image());
    let (incoming, missing) = Incoming::begin(&node.store, record.clone()).unwrap();
    assert!(missing.is_empty());
    assert_eq!(incoming.finish().unwrap(), record);
    assert_eq!(node.folders().len(), 1);
}

#[test]
fn a_damaged_chunk_is_not_written() {
    let destination = Node::new();
    let record = record("a:1", &image());
    let (incoming, _) = Incoming::begin(&destination.store, record.clone()).unwrap();
    let mut chunk = image()[..CHUNK].to_vec();
    chunk[7] ^= 1;
    let chunk = Bytes::from(chunk);
    assert!(matches!(
        incoming.place(0, &chunk),
        Err(HandoverError::Damaged { index: 0, .. })
    ));
    assert!(matches!(
        incoming.place(99, &chunk),
        Err(HandoverError::Unknown(_))
    ));
    let stranger = Digest::of(&chunk);
    assert!(matches!(
        incoming.place_digest(&stranger, &chunk),
        Err(HandoverError::Unknown(_))
    ));
    assert!(incoming.missing().contains(&0));
    assert!(matches!(
        incoming.finish(),
        Err(HandoverError::Incomplete(5))
    ));
    assert!(destination.folders().is_empty());
    assert!(destination.store.resolve("a:1").is_err());
}

#[test]
fn an_abandoned_handover_leaves_nothing() {
    let destination = Node::new();
    // What another image needs stays.
    let other = destination.put("b:1", &image()[..CHUNK]);
    let (incoming, _) = Incoming::begin(&destination.store, record("a:1", &image())).unwrap();
    for index in [0, 1] {
        let start = index as usize * CHUNK;
        let chunk = Bytes::copy_from_slice(&image()[start..start + CHUNK]);
        incoming.place(index, &chunk).unwrap();
    }
    assert_eq!(destination.chunks(), 2);
    drop(incoming);
    assert_eq!(destination.chunks(), 1);
    assert_eq!(destination.bytes(&other), &image()[..CHUNK]);
    destination.store.remove("b:1", &[]).unwrap();
    assert!(destination.folders().is_empty());
    assert_eq!(destination.chunks(), 0);
    // Nor does a crash, once the store is opened again.
    let images = destination.folder.path().join("images");
    fs::create_dir_all(images.join(".tmp-crash/rootfs/etc")).unwrap();
    fs::write(images.join(".tmp-names.json"), "{").unwrap();
    let destination = destination.reopen();
    assert!(destination.folders().is_empty());
}

#[test]
fn a_record_that_contradicts_itself_is_refused() {
    let destination = Node::new();
    let good = record("a:1", &image());
    let refuse = |change: &dyn Fn(&mut ImageRecord)| {
        let mut record = good.clone();
        change(&mut record);
        let result = Incoming::begin(&destination.store, record);
        assert!(
            matches!(result, Err(HandoverError::Record(_))),
            "{result:?}"
        );
    };
    refuse(&|r| r.name = "../../etc".into());
    refuse(&|r| r.chunk_size = 0);
    refuse(&|r| r.chunk_size = 3 << 16);
    refuse(&|r| r.erofs_size = 0);
    refuse(&|r| r.erofs_size = u64::MAX);
    refuse(&|r| r.erofs_size += 1);
    refuse(&|r| r.erofs_size += CHUNK as u64);
    refuse(&|r| r.chunks.truncate(1));
    refuse(&|r| r.chunks[0] = Digest::of(b"other"));
    refuse(&|r| r.erofs_digest = Digest::of(b"other"));
    refuse(&|r| r.config.cmd = vec!["a\0b".into()]);
    refuse(&|r| r.config.cmd = vec![String::new(); 2 << 20]);
    assert!(destination.folders().is_empty());
}

#[test]
fn a_short_last_chunk_cannot_pass_for_a_whole_one() {
    let destination = Node::new();
    let mut lie = record("a:1", &image());
    lie.chunks[4] = lie.chunks[0];
    lie.erofs_digest = ImageRecord::digest_of(lie.erofs_size, lie.chunk_size, &lie.chunks);
    let refused = Incoming::begin(&destination.store, lie).unwrap_err();
    assert!(matches!(
        refused,
        HandoverError::Record(BadRecord::LastChunk)
    ));
    // Nor may it claim to be a chunk of another image.
    destination.put("b:1", &image());
    let mut lie = record("a:1", &noise(7, 4096));
    lie.chunks[0] = Digest::of(&image()[..CHUNK]);
    lie.erofs_digest = ImageRecord::digest_of(lie.erofs_size, lie.chunk_size, &lie.chunks);
    let refused = Incoming::begin(&destination.store, lie.clone()).unwrap_err();
    assert!(matches!(
        refused,
        HandoverError::Store(StoreError::Misfit { index: 0 })
    ));
    assert!(destination.store.adopt(lie).is_err());
}

#[test]
fn a_peer_cannot_take_a_name_that_is_in_use() {
    let destination = Node::new();
    let mine = destination.put("redis:7", &noise(9, 4096));
    let theirs = record("redis:7", &image());
    let (incoming, missing) = Incoming::begin(&destination.store, theirs.clone()).unwrap();
    for index in missing {
        let start = index as usize * CHUNK;
        let end = (start + CHUNK).min(image().len());
        let chunk = Bytes::copy_from_slice(&image()[start..end]);
        incoming.place(index, &chunk).unwrap();
    }
    incoming.finish().unwrap();
    assert_eq!(
        destination.store.resolve("redis:7").unwrap().erofs_digest,
        mine.erofs_digest
    );
    let by_digest = destination
        .store
        .resolve(&theirs.erofs_digest.to_string())
        .unwrap();
    assert_eq!(by_digest, theirs);
    assert_eq!(destination.store.list().len(), 2);
}

#[test]
fn a_damaged_local_image_is_not_a_source() {
    let node = Node::new();
    let damaged = node.put("old:1", &image());
    let path = node.file(&damaged.chunks[0]);
    fs::write(&path, [&image()[..CHUNK - 1], b"x"].concat()).unwrap();
    let result = node.store.read_chunk(&damaged.erofs_digest, 0);
    assert!(matches!(result, Err(StoreError::Damaged { index: 0, .. })));
    let result = node.store.read_chunk(&damaged.erofs_digest, 5);
    assert!(matches!(result, Err(StoreError::NoChunk { index: 5, .. })));
    // It is set aside, for people to look at.
    assert!(!path.exists());
    let mut new = image();
    new.truncate(4 * CHUNK);
    let (_incoming, missing) = Incoming::begin(&node.store, record("new:1", &new)).unwrap();
    assert_eq!(missing, [0]);
}

#[test]
fn images_in_use_stay_and_the_last_name_takes_the_image_along() {
    let node = Node::new();
    let record = node.put("a:1", &image());
    node.store.add_name(&record, "b:1").unwrap();
    let in_use = [record.erofs_digest];
    // A name that is not the last one may go.
    node.store.remove("b:1", &in_use).unwrap();
    assert!(matches!(
        node.store.remove("a:1", &in_use),
        Err(StoreError::InUse(_))
    ));
    assert!(node.store.resolve("a:1").is_ok());
    node.store.remove("a:1", &[]).unwrap();
    assert!(matches!(
        node.store.resolve("a:1"),
        Err(StoreError::NotFound(_))
    ));
    assert!(node.folders().is_empty());
    let node = node.reopen();
    assert!(node.store.list().is_empty());
}

#[test]
fn a_store_has_one_owner() {
    let node = Node::new();
    let path = node.folder.path().join("images");
    assert!(matches!(
        ImageStore::open(&path),
        Err(StoreError::Locked { .. })
    ));
}

#[test]
fn a_damaged_folder_does_not_stop_the_store() {
    let node = Node::new();
    let record = node.put("a:1", &image());
    let damaged = node.put("b:1", &noise(5, 4096));
    let images = node.folder.path().join("images");
    fs::write(images.join(damaged.id().hex()).join("record.json"), "{").unwrap();
    fs::create_dir(images.join(Digest::of(b"empty").hex())).unwrap();
    let node = node.reopen();
    let names: Vec<String> = node.store.list().into_iter().map(|r| r.name).collect();
    assert_eq!(names, [record.name]);
}

#[test]
fn records_survive_json() {
    let record = record("a:1", &image());
    let json = serde_json::to_string(&record).unwrap();
    assert!(json.contains(&record.chunks[0].to_string()));
    assert_eq!(serde_json::from_str::<ImageRecord>(&json).unwrap(), record);
}
