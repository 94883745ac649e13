//! Verified chunks in memory, the least recently used go first. Bounded in bytes.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use crate::image::digest::Digest;

#[derive(Debug)]
pub(super) struct Cache {
    limit: usize,
    bytes: usize,
    /// Grows by one with each use.
    clock: u64,
    chunks: HashMap<Digest, (u64, Bytes)>,
    by_use: BTreeMap<u64, Digest>,
}

impl Cache {
    /// A cache of at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            bytes: 0,
            clock: 0,
            chunks: HashMap::new(),
            by_use: BTreeMap::new(),
        }
    }

    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.chunks.contains_key(digest)
    }

    pub(super) fn get(&mut self, digest: &Digest) -> Option<Bytes> {
        let (used, bytes) = self.chunks.get_mut(digest)?;
        self.by_use.remove(used);
        self.clock += 1;
        *used = self.clock;
        self.by_use.insert(self.clock, *digest);
        Some(bytes.clone())
    }

    /// Adds a verified chunk; one that is larger than the whole cache is left out.
    pub(super) fn put(&mut self, digest: Digest, bytes: Bytes) {
        if bytes.len() > self.limit || self.get(&digest).is_some() {
            return;
        }
        while self.bytes + bytes.len() > self.limit {
            let Some((_, oldest)) = self.by_use.pop_first() else {
                break;
            };
            if let Some((_, old)) = self.chunks.remove(&oldest) {
                self.bytes -= old.len();
            }
        }
        self.clock += 1;
        self.bytes += bytes.len();
        self.by_use.insert(self.clock, digest);
        self.chunks.insert(digest, (self.clock, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_last_stays_and_the_bytes_are_bounded() {
        let mut cache = Cache::new(30);
        let digest = |n: u8| Digest([n; 32]);
        for n in 0..3 {
            cache.put(digest(n), vec![n; 10].into());
        }
        assert_eq!(cache.get(&digest(0)).unwrap()[0], 0);
        cache.put(digest(3), vec![3; 15].into());
        assert!(cache.has(&digest(0)));
        assert!(!cache.has(&digest(1)) && !cache.has(&digest(2)));
        assert_eq!(cache.bytes, 25);
        cache.put(digest(4), vec![4; 31].into());
        assert!(!cache.has(&digest(4)));
        cache.put(digest(3), vec![9; 15].into());
        assert_eq!(cache.get(&digest(3)).unwrap()[0], 3);
        assert_eq!(cache.bytes, 25);
    }
}
