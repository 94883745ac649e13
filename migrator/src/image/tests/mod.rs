//! Tests of the parts together. None needs root or mkfs.erofs: those are in the `tests` crate.

mod arriving;
mod chunks;
mod handover;
mod layers;
mod layouts;
mod streams;

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use ::tar::{Builder, EntryType, Header};

use super::digest::Digest;
use super::layer::{self, Budget, LayerError};
use super::rootfs::Rootfs;

/// A layer under construction. Everything belongs to the user who runs the test.
pub(super) struct LayerTar(Builder<Vec<u8>>);

impl LayerTar {
    pub(super) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn entry(
        mut self,
        kind: EntryType,
        path: &[u8],
        link: &[u8],
        mode: u32,
        content: &[u8],
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(u64::from(nix::unistd::geteuid().as_raw()));
        header.set_gid(u64::from(nix::unistd::getegid().as_raw()));
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        // Written as they are: the crate's own setters refuse hostile names.
        let old = header.as_old_mut();
        let name_length = path.len().min(100);
        old.name[..name_length].copy_from_slice(&path[..name_length]);
        let link_length = link.len().min(100);
        old.linkname[..link_length].copy_from_slice(&link[..link_length]);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(super) fn file(self, path: &str, content: &str) -> Self {
        self.entry(
            EntryType::Regular,
            path.as_bytes(),
            b"",
            0o644,
            content.as_bytes(),
        )
    }

    pub(super) fn file_mode(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Regular, path.as_bytes(), b"", mode, b"x")
    }

    pub(super) fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path.as_bytes(), b"", 0o755, b"")
    }

    pub(super) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(
            EntryType::Symlink,
            path.as_bytes(),
            target.as_bytes(),
            0o777,
            b"",
        )
    }

    pub(super) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(
            EntryType::Link,
            path.as_bytes(),
            target.as_bytes(),
            0o644,
            b"",
        )
    }

    pub(super) fn fifo(self, path: &str) -> Self {
        self.entry(EntryType::Fifo, path.as_bytes(), b"", 0o600, b"")
    }

    /// A header that belongs to the entry behind it: PAX (`x`), GNU long name (`L`).
    pub(super) fn extension(self, kind: u8, content: &[u8]) -> Self {
        self.entry(EntryType::new(kind), b"ext", b"", 0o644, content)
    }

    /// A PAX header with these records.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            content.extend_from_slice(format!("{length} {key}=").as_bytes());
            content.extend_from_slice(value);
            content.push(b'\n');
        }
        self.extension(b'x', &content)
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that differ from chunk to chunk.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let blocks = (0..length.div_ceil(32) as u64).map(|i| {
        let mut block = seed.to_le_bytes().to_vec();
        block.extend_from_slice(&i.to_le_bytes());
        Digest::of(&block).0
    });
    let mut bytes: Vec<u8> = blocks.flatten().collect();
    bytes.truncate(length);
    bytes
}

/// Enough for what the tests unpack.
pub(super) const BUDGET: Budget = Budget {
    entries: 1000,
    bytes: 10 << 20,
};

pub(super) struct Tree {
    folder: tempfile::TempDir,
    pub(super) rootfs: Rootfs,
}

impl Tree {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rootfs = Rootfs::create(&folder.path().join("rootfs")).unwrap();
        Self { folder, rootfs }
    }

    pub(super) fn apply(&mut self, layer: LayerTar) -> Result<(), LayerError> {
        self.apply_bytes(&layer.bytes())
    }

    pub(super) fn apply_bytes(&mut self, layer: &[u8]) -> Result<(), LayerError> {
        let mut budget = BUDGET;
        layer::apply(layer, Digest::of(layer), &mut self.rootfs, &mut budget)
    }

    pub(super) fn finish(self) -> tempfile::TempDir {
        self.rootfs.finish().unwrap();
        self.folder
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("rootfs").join(path)
    }

    pub(super) fn text(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.path(path).symlink_metadata().is_ok()
    }
}

/// Applies layers that must all be fine.
pub(super) fn tree(layers: impl IntoIterator<Item = LayerTar>) -> Tree {
    let mut tree = Tree::new();
    for layer in layers {
        tree.apply(layer).unwrap();
    }
    tree
}
