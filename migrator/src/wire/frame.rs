//! Frames: `u32` little-endian length, `u8` type, payload. Every length is checked before anything is allocated.

use bytes::{Buf, Bytes, BytesMut};

/// Bytes before a frame's payload: the length and the type.
pub const HEADER: usize = 5;

/// What a connection carries. Each lane has its own message types and its own frame limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// The conversation of the two state machines, and the device state.
    Control,
    /// Guest pages and image chunks.
    Data,
    /// What must not queue behind pages: parked packets.
    Urgent,
    /// Pages that a guest waits for.
    Fault,
}

impl Lane {
    /// The largest frame of this lane in bytes, type and payload together.
    ///
    /// Control: 1 MiB. Data: 1 MiB of pages and room for their header. Urgent: 128 KiB, which holds one
    /// GSO frame of 64 KiB with its headers. Fault: 64 KiB of pages and room for their header.
    pub const fn max_frame(self) -> usize {
        match self {
            Self::Control => 1 << 20,
            Self::Data => (1 << 20) + 64,
            Self::Urgent => 128 << 10,
            Self::Fault => (64 << 10) + 64,
        }
    }
}

/// One frame, not yet understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawFrame {
    /// The frame's type; never 0.
    pub kind: u8,
    /// What follows the type.
    pub payload: Bytes,
}

/// A frame that no peer of ours sends: the connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A length of 0 has no room for the type.
    #[error("a frame of length 0 came: the peer does not speak this protocol")]
    Empty,
    /// Longer than the lane's limit.
    #[error(
        "a {lane:?} frame of {length} bytes came, the limit is {limit}: the peer is broken or not ours"
    )]
    TooLong {
        /// The lane it came on.
        lane: Lane,
        /// Its length.
        length: usize,
        /// The lane's limit.
        limit: usize,
    },
    /// Type 0, which is never valid: zeroed memory is not a message.
    #[error("a frame of type 0 came, which is never valid: the peer is broken or not ours")]
    ZeroType,
}

/// Looks at the start of `buf`: how many bytes the first frame has in all, its header included, or `None` if
/// the header is not there yet.
///
/// # Errors
///
/// See [`FrameError`]. Nothing has been allocated for the frame then.
pub fn frame_size(buf: &[u8], lane: Lane) -> Result<Option<usize>, FrameError> {
    let Some(header) = buf.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*header) as usize;
    let limit = lane.max_frame();
    if length == 0 {
        return Err(FrameError::Empty);
    }
    if length > limit {
        return Err(FrameError::TooLong {
            lane,
            length,
            limit,
        });
    }
    if buf.get(4) == Some(&0) {
        return Err(FrameError::ZeroType);
    }
    Ok(Some(4 + length))
}

/// Cuts the first whole frame off `buf` without copying; `None` means that more bytes are needed.
///
/// # Errors
///
/// See [`FrameError`].
pub fn take_frame(buf: &mut BytesMut, lane: Lane) -> Result<Option<RawFrame>, FrameError> {
    let Some(size) = frame_size(buf, lane)? else {
        return Ok(None);
    };
    if buf.len() < size {
        return Ok(None);
    }
    let mut frame = buf.split_to(size).freeze();
    let kind = frame[4];
    frame.advance(HEADER);
    Ok(Some(RawFrame {
        kind,
        payload: frame,
    }))
}

/// The header of a frame whose payload has `payload` bytes.
///
/// # Panics
///
/// When the frame would not fit its length field: payloads are bounded by [`Lane::max_frame`] long before.
pub fn header(kind: u8, payload: usize) -> [u8; HEADER] {
    let length = u32::try_from(payload + 1).expect("frames are bounded by their lane's limit");
    let [a, b, c, d] = length.to_le_bytes();
    [a, b, c, d, kind]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_bytes_are_pinned() {
        assert_eq!(header(0x41, 0x0102), [0x03, 0x01, 0, 0, 0x41]);
    }

    #[test]
    fn a_length_over_the_limit_is_refused_from_its_four_bytes_alone() {
        let buf = u32::MAX.to_le_bytes();
        assert!(matches!(
            frame_size(&buf, Lane::Urgent),
            Err(FrameError::TooLong { .. })
        ));
    }

    #[test]
    fn zero_is_an_invalid_length_and_an_invalid_type() {
        assert_eq!(frame_size(&[0; 4], Lane::Data), Err(FrameError::Empty));
        assert_eq!(
            frame_size(&[1, 0, 0, 0, 0], Lane::Data),
            Err(FrameError::ZeroType)
        );
    }

    proptest! {
        #[test]
        fn a_truncated_frame_needs_more(kind in 1u8.., payload in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..305) {
            let mut whole = header(kind, payload.len()).to_vec();
            whole.extend_from_slice(&payload);
            let cut = cut.min(whole.len() - 1);
            let mut part = BytesMut::from(&whole[..cut]);
            prop_assert_eq!(take_frame(&mut part, Lane::Control), Ok(None));
            prop_assert_eq!(part.len(), cut);
            let mut all = BytesMut::from(&whole[..]);
            let frame = take_frame(&mut all, Lane::Control).unwrap().unwrap();
            prop_assert_eq!(frame.kind, kind);
            prop_assert_eq!(&frame.payload[..], &payload[..]);
            prop_assert!(all.is_empty());
        }

        #[test]
        fn junk_never_panics(junk in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut buf = BytesMut::from(&junk[..]);
            while let Ok(Some(_)) = take_frame(&mut buf, Lane::Data) {}
        }
    }
}
