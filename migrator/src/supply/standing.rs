//! Which sources are asked first, and which are left alone. Pure: time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::image::Digest;

/// How long a source is left alone after its first failure; twice as long after each further one.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest.
const PAUSE_MOST: Duration = Duration::from_secs(30);
/// How long a source is left alone that gave something wrong.
const LIAR: Duration = Duration::from_secs(60);

/// What is known of sources, by [`address`](super::ChunkSource::address). Times are since a moment that the caller chose.
#[derive(Debug, Default)]
pub(super) struct Standing {
    known: BTreeMap<String, Known>,
    /// By image, when each one gave a chunk of it last.
    given: BTreeMap<Digest, BTreeMap<String, u64>>,
    /// Grows by one with each chunk that came.
    clock: u64,
}

#[derive(Debug, Default)]
struct Known {
    failures: u32,
    /// Until when it is left alone, and why.
    pause: Option<(Duration, String)>,
}

impl Standing {
    /// It gave a chunk of an image.
    pub(super) fn good(&mut self, image: &Digest, name: &str) {
        self.clock += 1;
        self.known.remove(name);
        let given = self.given.entry(*image).or_default();
        given.insert(name.to_owned(), self.clock);
    }

    /// An image is gone, or all here.
    pub(super) fn forget(&mut self, image: &Digest) {
        self.given.remove(image);
    }

    /// It did not answer, or said that it cannot. Whether that is news.
    pub(super) fn failed(&mut self, name: &str, why: String, now: Duration) -> bool {
        let known = self.known.entry(name.to_owned()).or_default();
        let pause = PAUSE
            .saturating_mul(1 << known.failures.min(8))
            .min(PAUSE_MOST);
        known.failures += 1;
        known.pause = Some((now + pause, why));
        known.failures == 1
    }

    /// It gave something wrong.
    pub(super) fn lied(&mut self, name: &str, why: String, now: Duration) {
        let known = self.known.entry(name.to_owned()).or_default();
        known.pause = Some((now + LIAR, why));
    }

    /// Why a source is left alone now.
    pub(super) fn paused(&self, name: &str, now: Duration) -> Option<&str> {
        let (until, why) = self.known.get(name)?.pause.as_ref()?;
        (*until > now).then_some(why)
    }

    /// For sorting: who gave a chunk of the image last comes first, the others as they were.
    pub(super) fn rank(&self, image: &Digest, name: &str) -> std::cmp::Reverse<u64> {
        let given = self.given.get(image).and_then(|given| given.get(name));
        std::cmp::Reverse(given.copied().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const IMAGE: Digest = Digest([1; 32]);

    #[test]
    fn who_fails_is_left_alone_for_longer_each_time_until_it_gives_something() {
        let mut standing = Standing::default();
        let mut now = Duration::ZERO;
        for pause in [1, 2, 4, 8, 16, 30, 30] {
            standing.failed("b", "gone".to_owned(), now);
            now += SECOND * pause - Duration::from_millis(1);
            assert_eq!(standing.paused("b", now), Some("gone"));
            now += Duration::from_millis(1);
            assert_eq!(standing.paused("b", now), None);
        }
        standing.good(&IMAGE, "b");
        standing.failed("b", "gone".to_owned(), now);
        assert_eq!(standing.paused("b", now + SECOND), None);
    }

    #[test]
    fn who_lies_is_left_alone_for_a_minute_and_others_are_not() {
        let mut standing = Standing::default();
        standing.lied("b", "wrong bytes".to_owned(), SECOND);
        assert!(standing.paused("b", SECOND * 60).is_some());
        assert!(standing.paused("b", SECOND * 61).is_none());
        assert!(standing.paused("c", SECOND * 2).is_none());
    }

    #[test]
    fn who_gave_something_last_is_asked_first() {
        let mut standing = Standing::default();
        standing.good(&IMAGE, "c");
        standing.good(&IMAGE, "b");
        let mut names = ["a", "c", "b", "d"];
        names.sort_by_key(|name| standing.rank(&IMAGE, name));
        assert_eq!(names, ["b", "c", "a", "d"]);
        // That says nothing of another image.
        names.sort();
        names.sort_by_key(|name| standing.rank(&Digest([2; 32]), name));
        assert_eq!(names, ["a", "b", "c", "d"]);
        standing.forget(&IMAGE);
        names.sort_by_key(|name| standing.rank(&IMAGE, name));
        assert_eq!(names, ["a", "b", "c", "d"]);
    }
}
