//! In which order the chunks of an image were first read, kept beside the image as `u32`s, little-endian.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::bits::Bits;

/// The order of first use. It outlives the service, but not every power cut: it is only a hint.
#[derive(Debug)]
pub struct UseOrder {
    seen: Bits,
    list: Mutex<List>,
}

#[derive(Debug)]
struct List {
    order: Vec<u32>,
    /// `None` once it could not be written.
    file: Option<File>,
}

impl UseOrder {
    /// Opens the order of an image of `count` chunks; what makes no sense in the file is left out.
    pub(crate) fn open(path: &Path, count: usize) -> Self {
        let seen = Bits::new(count);
        let bytes = fs::read(path).unwrap_or_default();
        let (words, _) = bytes.as_chunks::<4>();
        let words = words.iter().map(|word| u32::from_le_bytes(*word));
        let order: Vec<u32> = words
            .filter(|index| (*index as usize) < count && seen.insert(*index))
            .collect();
        // Written anew: a word that was cut off would shift those behind it.
        let file = rewrite(path, &order)
            .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "the order of use is not kept"))
            .ok();
        let list = Mutex::new(List { order, file });
        Self { seen, list }
    }

    /// A chunk is read.
    pub fn mark(&self, index: u32) {
        if self.seen.insert(index) {
            self.append(&[index]);
        }
    }

    /// Adds what another node says of its order; indices that the image does not have are left out.
    pub fn add(&self, order: &[u32], count: usize) {
        let fits = |index: &u32| (*index as usize) < count && self.seen.insert(*index);
        let new: Vec<u32> = order.iter().copied().filter(fits).collect();
        self.append(&new);
    }

    /// The order so far.
    pub fn list(&self) -> Vec<u32> {
        self.lock().order.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, List> {
        // The list is what was appended, in any case.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, new: &[u32]) {
        let mut list = self.lock();
        list.order.extend(new);
        let bytes: Vec<u8> = new.iter().flat_map(|index| index.to_le_bytes()).collect();
        let written = list.file.as_mut().map(|file| file.write_all(&bytes));
        if let Some(Err(error)) = written {
            // A full disk, say. Nothing depends on it.
            tracing::debug!(%error, "the order of use is not kept any more");
            list.file = None;
        }
    }
}

fn rewrite(path: &Path, order: &[u32]) -> io::Result<File> {
    let mut file = File::create(path)?;
    let bytes: Vec<u8> = order.iter().flat_map(|index| index.to_le_bytes()).collect();
    file.write_all(&bytes)?;
    Ok(file)
}
