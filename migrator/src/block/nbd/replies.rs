//! Replies that are sent together. Pure.

/// Beyond this they are sent. More at once would only have the client wait for the first.
const MANY: usize = 64 << 10;

/// Replies, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Replies {
    /// Keeps its length: what is behind `filled` are bytes of earlier replies.
    bytes: Vec<u8>,
    filled: usize,
}

impl Replies {
    /// Adds a reply with so many bytes of data, which `fill` puts in their place; nothing if it cannot. Whether it was added.
    pub(super) fn add(
        &mut self,
        header: &[u8],
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        let data = self.filled + header.len();
        let end = data + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        if !fill(&mut self.bytes[data..end]) {
            return false;
        }
        self.bytes[self.filled..data].copy_from_slice(header);
        self.filled = end;
        true
    }

    /// Whether they should be sent.
    pub(super) fn are_many(&self) -> bool {
        self.filled >= MANY
    }

    /// All of them; none are left.
    pub(super) fn take(&mut self) -> &[u8] {
        &self.bytes[..std::mem::take(&mut self.filled)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_follow_each_other_and_one_that_cannot_be_filled_is_none() {
        let mut replies = Replies::default();
        let put = |text: &'static [u8]| {
            move |data: &mut [u8]| {
                data.copy_from_slice(text);
                true
            }
        };
        assert!(replies.add(b"h1", 3, put(b"abc")));
        assert!(!replies.add(b"h2", 4, |data| {
            data.fill(b'x');
            false
        }));
        assert!(replies.add(b"h3", 1, put(b"d")));
        assert!(!replies.are_many());
        assert_eq!(replies.take(), b"h1abch3d");
        assert_eq!(replies.take(), b"");
        assert!(replies.add(b"h", MANY, |_| true));
        assert!(replies.are_many());
    }
}
