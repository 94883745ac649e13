//! Which codec pays: `--compress auto`. Pure: what was measured comes in as arguments, and so does the time.
//!
//! Memory crosses at the rate of the slower of two things, the connections' own work and the link:
//!
//! ```text
//! as it is   link
//! a codec    min(1 / (1/speed + ratio/cpu), link/ratio)
//!
//! speed      bytes of pages that the codec takes a second
//! ratio      what it leaves of a byte
//! cpu        bytes a second that can be encrypted and handed to the kernel
//! ```
//!
//! So a link that is slower than what a codec puts out is worth compressing for, and one that is faster is not. The codec with
//! the highest rate is taken, and left again only for one that is faster by [`MARGIN`].
//!
//! The link's rate is what went out in a window of [`WINDOW`] in which the connections were busy writing. While they are busy
//! compressing instead, they do not fill the link: then the rate that was known stands (it can only be higher than what is
//! seen), and once in [`PROBE`] windows one goes out as it is, to see it again. The codecs' speeds and ratios are those of what they
//! packed, and of a sample of a few pages a window for those that are not in use. Windows begin anew with each round.

use std::time::Duration;

use crate::wire::bulk::Codec;

/// How often the choice is thought over.
pub const WINDOW: Duration = Duration::from_millis(50);
/// A window with fewer bytes on the wire says nothing of the link.
const WINDOW_BYTES: u64 = 64 << 10;
/// What another codec must promise, to be worth the change.
pub const MARGIN: f64 = 1.15;
/// Windows in which the link was not filled, until it is measured again.
const PROBE: u32 = 20;
/// The connections fill the link when, on average, this many of them are writing.
const BUSY: f64 = 0.7;
/// Weight of a new measurement.
const GAIN: f64 = 0.5;

/// What a codec does with this guest's pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Bytes of pages a second, all compressors together.
    pub bytes_per_s: f64,
    /// Packed bytes a byte of pages.
    pub ratio: f64,
}

/// What is known when a choice is made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Known {
    /// Bytes a second that the link carries.
    pub link: Option<f64>,
    /// Bytes a second that the connections could hand over, were the link never full: those of the fastest write so far.
    pub cpu: Option<f64>,
    /// LZ4's speed.
    pub lz4: Option<Speed>,
    /// zstd's speed.
    pub zstd: Option<Speed>,
}

impl Known {
    /// Bytes of pages a second that would cross with `codec`; `None` when that is not known yet.
    pub fn rate(&self, codec: Option<Codec>) -> Option<f64> {
        let link = self.link?;
        let speed = match codec {
            None => return Some(link),
            Some(Codec::Lz4) => self.lz4?,
            Some(Codec::Zstd) => self.zstd?,
        };
        let handed = self.cpu.map_or(0.0, |cpu| speed.ratio / cpu);
        let work = 1.0 / speed.bytes_per_s + handed;
        Some((1.0 / work).min(link / speed.ratio))
    }

    /// The codec to use from here on, after `current`.
    pub fn choose(&self, current: Option<Codec>) -> Option<Codec> {
        let best = [None, Some(Codec::Lz4), Some(Codec::Zstd)]
            .into_iter()
            .filter_map(|codec| Some((codec, self.rate(codec)?)))
            .reduce(|best, next| if next.1 > best.1 { next } else { best });
        match (best, self.rate(current)) {
            (Some((codec, rate)), Some(ours)) if rate > ours * MARGIN => codec,
            (Some((codec, _)), None) => codec,
            (Some(_) | None, _) => current,
        }
    }
}

/// Follows one migration's connections, and says what they use.
#[derive(Debug)]
pub struct Auto {
    known: Known,
    codec: Option<Codec>,
    /// Compressors that run at the same time.
    parallel: f64,
    began: Duration,
    bytes: u64,
    writing: Duration,
    unfilled: u32,
    probing: bool,
}

impl Auto {
    /// Begins without a codec. `parallel` connections can compress at the same time.
    pub fn new(parallel: usize) -> Self {
        Self {
            known: Known::default(),
            codec: None,
            parallel: parallel as f64,
            began: Duration::ZERO,
            bytes: 0,
            writing: Duration::ZERO,
            unfilled: 0,
            probing: false,
        }
    }

    /// What to use now.
    pub fn codec(&self) -> Option<Codec> {
        if self.probing { None } else { self.codec }
    }

    /// A round begins at `now`: what was idle before does not count.
    pub fn round(&mut self, now: Duration) {
        self.began = now;
        self.bytes = 0;
        self.writing = Duration::ZERO;
    }

    /// A codec made `packed` bytes of `raw` ones in `took`.
    pub fn packed(&mut self, codec: Codec, raw: usize, packed: usize, took: Duration) {
        let slot = match codec {
            Codec::Lz4 => &mut self.known.lz4,
            Codec::Zstd => &mut self.known.zstd,
        };
        let new = Speed {
            bytes_per_s: raw as f64 / took.as_secs_f64().max(1e-9) * self.parallel,
            ratio: packed.max(1) as f64 / raw.max(1) as f64,
        };
        *slot = Some(slot.map_or(new, |old| Speed {
            bytes_per_s: mean(old.bytes_per_s, new.bytes_per_s),
            ratio: mean(old.ratio, new.ratio),
        }));
    }

    /// A connection wrote `bytes`, which took it `took` until `now`. True at the end of a window: then the caller hands in a sample
    /// of each codec that is not in use ([`Self::packed`]), and calls [`Self::think`].
    pub fn wrote(&mut self, bytes: u64, took: Duration, now: Duration) -> bool {
        self.bytes += bytes;
        self.writing += took;
        if bytes >= WINDOW_BYTES {
            let rate = bytes as f64 / took.as_secs_f64().max(1e-9) * self.parallel;
            self.known.cpu = Some(self.known.cpu.map_or(rate, |most| most.max(rate)));
        }
        now.saturating_sub(self.began) >= WINDOW && self.bytes >= WINDOW_BYTES
    }

    /// Makes the choice at the end of a window; does nothing if somebody else has just done so.
    pub fn think(&mut self, now: Duration) {
        if now.saturating_sub(self.began) < WINDOW {
            return;
        }
        let wall = now.saturating_sub(self.began).as_secs_f64().max(1e-9);
        let rate = self.bytes as f64 / wall;
        let filled = self.writing.as_secs_f64() / wall >= BUSY;
        self.known.link = Some(match self.known.link {
            None => rate,
            // A window that was sent to see the link says more than what was thought of it before.
            Some(_) if filled && self.probing => rate,
            Some(link) if filled => mean(link, rate),
            Some(link) => link.max(rate),
        });
        self.unfilled = if filled { 0 } else { self.unfilled + 1 };
        self.probing = false;
        self.codec = self.known.choose(self.codec);
        if self.unfilled >= PROBE && self.codec.is_some() {
            self.unfilled = 0;
            self.probing = true;
        }
        self.round(now);
    }
}

fn mean(old: f64, new: f64) -> f64 {
    old + GAIN * (new - old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MB: f64 = 1e6;
    /// Bytes of pages that a connection handles at a time.
    const CHUNK: f64 = 262_144.0;
    /// And those that it tries a codec with.
    const SAMPLE: f64 = 65_536.0;

    /// A machine with one connection: a link behind a buffer, and compressors.
    #[derive(Clone, Copy, Debug)]
    struct World {
        link: f64,
        /// Bytes that the link takes before a writer waits: more than a chunk, or the two never work at the same time.
        buffer: f64,
        /// Bytes a second that are encrypted and handed to the kernel.
        cpu: f64,
        lz4: Speed,
        zstd: Speed,
    }

    impl World {
        fn speed(&self, codec: Codec) -> Speed {
            match codec {
                Codec::Lz4 => self.lz4,
                Codec::Zstd => self.zstd,
            }
        }

        /// Bytes of pages a second in the long run, one thread doing everything.
        fn rate(&self, codec: Option<Codec>) -> f64 {
            match codec {
                None => self.link.min(self.cpu),
                Some(codec) => {
                    let speed = self.speed(codec);
                    let busy = 1.0 / speed.bytes_per_s + speed.ratio / self.cpu;
                    (1.0 / busy).min(self.link / speed.ratio)
                }
            }
        }

        /// Sends for `seconds` from `*now` on. Returns the bytes of pages a second of the last half.
        fn run(&self, auto: &mut Auto, now: &mut f64, seconds: f64) -> f64 {
            let (began, mut free, mut late) = (*now, *now, 0.0);
            while *now < began + seconds {
                let mut bytes = CHUNK;
                if let Some(codec) = auto.codec() {
                    let speed = self.speed(codec);
                    let took = CHUNK / speed.bytes_per_s;
                    bytes *= speed.ratio;
                    *now += took;
                    auto.packed(
                        codec,
                        CHUNK as usize,
                        bytes as usize,
                        Duration::from_secs_f64(took),
                    );
                }
                let start = *now;
                *now += bytes / self.cpu;
                free = f64::max(free, *now) + bytes / self.link;
                *now = now.max(free - self.buffer / self.link);
                let at = Duration::from_secs_f64(*now);
                if auto.wrote(bytes as u64, Duration::from_secs_f64(*now - start), at) {
                    for codec in [Codec::Lz4, Codec::Zstd] {
                        if auto.codec() != Some(codec) {
                            let speed = self.speed(codec);
                            let took = SAMPLE / speed.bytes_per_s;
                            *now += took;
                            let packed = (SAMPLE * speed.ratio) as usize;
                            auto.packed(
                                codec,
                                SAMPLE as usize,
                                packed,
                                Duration::from_secs_f64(took),
                            );
                        }
                    }
                    auto.think(Duration::from_secs_f64(*now));
                }
                if *now > began + seconds / 2.0 {
                    late += CHUNK;
                }
            }
            late / (*now - began - seconds / 2.0)
        }
    }

    fn text() -> World {
        World {
            link: 12.5 * MB,
            buffer: 4.0 * MB,
            cpu: 800.0 * MB,
            lz4: Speed {
                bytes_per_s: 450.0 * MB,
                ratio: 0.5,
            },
            zstd: Speed {
                bytes_per_s: 300.0 * MB,
                ratio: 0.33,
            },
        }
    }

    #[test]
    fn a_slow_link_gets_the_better_ratio_a_middling_one_the_faster_codec_a_fast_one_none() {
        for (link, codec) in [
            (12.5, Some(Codec::Zstd)),
            (200.0, Some(Codec::Lz4)),
            (1_200.0, None),
        ] {
            let world = World {
                link: link * MB,
                ..text()
            };
            let mut auto = Auto::new(1);
            world.run(&mut auto, &mut 0.0, 10.0);
            assert_eq!(auto.codec, codec, "{link} MB/s, {:?}", auto.known);
        }
    }

    #[test]
    fn pages_that_do_not_compress_are_left_alone() {
        let same = Speed {
            bytes_per_s: 600.0 * MB,
            ratio: 1.0,
        };
        let world = World {
            lz4: same,
            zstd: same,
            ..text()
        };
        let mut auto = Auto::new(1);
        world.run(&mut auto, &mut 0.0, 10.0);
        assert_eq!(auto.codec, None);
    }

    #[test]
    fn a_link_that_changes_is_noticed() {
        let (fast, slow) = (
            World {
                link: 2_000.0 * MB,
                ..text()
            },
            text(),
        );
        let (mut auto, mut now) = (Auto::new(1), 0.0);
        for (world, codec) in [
            (fast, None),
            (slow, Some(Codec::Zstd)),
            (fast, None),
            (slow, Some(Codec::Zstd)),
        ] {
            world.run(&mut auto, &mut now, 20.0);
            assert_eq!(auto.codec, codec, "{world:?}, {:?}", auto.known);
            auto.round(Duration::from_secs_f64(now));
        }
    }

    fn speed() -> impl Strategy<Value = Speed> {
        (50.0..2_000.0, 0.02..1.0).prop_map(|(mb, ratio): (f64, f64)| Speed {
            bytes_per_s: mb * MB,
            ratio,
        })
    }

    proptest! {
        #[test]
        fn the_choice_is_never_much_worse_than_the_best(link in 1.0..3_000.0, lz4 in speed(), zstd in speed(), first in 0usize..3) {
            let known = Known { link: Some(link * MB), cpu: Some(800.0 * MB), lz4: Some(lz4), zstd: Some(zstd) };
            let all = [None, Some(Codec::Lz4), Some(Codec::Zstd)];
            let chosen = known.choose(all[first]);
            let best = all.iter().filter_map(|codec| known.rate(*codec)).fold(0.0, f64::max);
            prop_assert!(known.rate(chosen).unwrap() * MARGIN >= best);
            // And it stays: nothing changes without a reason.
            prop_assert_eq!(known.choose(chosen), chosen);
            // On a link faster than every codec, none is begun.
            if link * MB > lz4.bytes_per_s.max(zstd.bytes_per_s) {
                prop_assert_eq!(known.choose(None), None);
            }
        }

        #[test]
        fn sending_is_never_much_slower_than_without(link in 2.0..3_000.0, lz4 in speed(), zstd in speed(), buffer in 0.3..8.0) {
            let world = World { link: link * MB, buffer: buffer * MB, lz4, zstd, ..text() };
            let mut auto = Auto::new(1);
            let rate = world.run(&mut auto, &mut 0.0, 10.0);
            prop_assert!(rate > world.rate(None) * 0.7, "{} of {}: {:?}", rate / MB, world.rate(None) / MB, auto);
        }

        #[test]
        fn nothing_known_changes_nothing(link in proptest::option::of(1.0..3_000.0)) {
            let known = Known { link, ..Known::default() };
            prop_assert_eq!(known.choose(None), None);
        }
    }
}
