//! What the connections of one migration share: the codec in use, and what compression has saved.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use super::Compress;
use super::auto::Auto;
use super::pack::Packing;
use crate::wire::bulk::Codec;

/// The codec in use, by wish or by measurement.
#[derive(Debug)]
pub(in crate::memory) struct Choice {
    wish: Compress,
    auto: Mutex<Auto>,
    began: Instant,
    /// Bytes of pages that were packed with a codec, and that went as they are.
    lz4: AtomicU64,
    zstd: AtomicU64,
    plain: AtomicU64,
}

impl Choice {
    pub(in crate::memory) fn new(wish: Compress, lanes: usize) -> Self {
        // The other half of the machine belongs to guests, and to the encryption.
        let half = available_parallelism().map_or(1, |cpus| cpus.get().div_ceil(2));
        Self {
            wish,
            auto: Mutex::new(Auto::new(lanes.min(half))),
            began: Instant::now(),
            lz4: AtomicU64::new(0),
            zstd: AtomicU64::new(0),
            plain: AtomicU64::new(0),
        }
    }

    pub(in crate::memory) fn codec(&self) -> Option<Codec> {
        match self.wish {
            Compress::None => None,
            Compress::Lz4 => Some(Codec::Lz4),
            Compress::Zstd => Some(Codec::Zstd),
            Compress::Auto => self.auto().codec(),
        }
    }

    pub(in crate::memory) fn round(&self) {
        self.auto().round(self.began.elapsed());
    }

    /// A page went as it is.
    pub(in crate::memory) fn plain(&self, bytes: usize) {
        self.plain.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(in crate::memory) fn packed(&self, packing: &Packing) {
        let count = match (packing.packed < packing.raw, packing.codec) {
            (true, Codec::Lz4) => &self.lz4,
            (true, Codec::Zstd) => &self.zstd,
            (false, Codec::Lz4 | Codec::Zstd) => &self.plain,
        };
        count.fetch_add(packing.raw as u64, Ordering::Relaxed);
        self.sampled(packing);
    }

    fn sampled(&self, packing: &Packing) {
        let Packing {
            codec,
            raw,
            packed,
            took,
        } = *packing;
        self.auto().packed(codec, raw, packed, took);
    }

    /// A connection wrote `bytes` in `took`. At the end of a window `sample` is asked how a codec would do that is not in use.
    pub(in crate::memory) fn wrote(
        &self,
        bytes: u64,
        took: Duration,
        mut sample: impl FnMut(Codec) -> Option<Packing>,
    ) {
        if self.wish != Compress::Auto {
            return;
        }
        let current = {
            let mut auto = self.auto();
            if !auto.wrote(bytes, took, self.began.elapsed()) {
                return;
            }
            auto.codec()
        };
        // The other connections write on meanwhile. Two may sample at once, and both are right.
        for codec in [Codec::Lz4, Codec::Zstd] {
            if current != Some(codec)
                && let Some(packing) = sample(codec)
            {
                self.sampled(&packing);
            }
        }
        self.auto().think(self.began.elapsed());
    }

    /// Bytes of all pages with content.
    pub(in crate::memory) fn raw_bytes(&self) -> u64 {
        let all = [&self.lz4, &self.zstd, &self.plain];
        all.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// What most pages went with; never [`Compress::Auto`].
    pub(in crate::memory) fn mostly(&self) -> Compress {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (lz4, zstd, plain) = (of(&self.lz4), of(&self.zstd), of(&self.plain));
        if plain >= lz4.max(zstd) {
            Compress::None
        } else if lz4 >= zstd {
            Compress::Lz4
        } else {
            Compress::Zstd
        }
    }

    fn auto(&self) -> MutexGuard<'_, Auto> {
        // Its fields are plain numbers, each of which is right by itself.
        self.auto.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
