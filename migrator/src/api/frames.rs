//! The byte stream of an upgraded `exec`: `migrator-exec/1`.
//!
//! A client that sends `Upgrade: migrator-exec/1` with `POST /v1/pods/NAME/exec` gets `101` and then
//! frames in both directions: `u8` type | `u32` little-endian payload length | payload.
//!
//! | type | direction | payload |
//! |---|---|---|
//! | 1 stdin | to the command | bytes |
//! | 2 end of stdin | to the command | none |
//! | 3 resize | to the command | `u16` rows, `u16` columns, little-endian |
//! | 4 signal | to the command | `u32` signal number, little-endian |
//! | 5 stdout | from it | bytes |
//! | 6 stderr | from it | bytes |
//! | 7 exited | from it, last | `i32` exit code, little-endian |
//! | 8 failed | from it, last | JSON, as in every error's `error` |
//!
//! Zero is an invalid type. A payload has at most [`MAX_PAYLOAD`] bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use super::types::TtySize;

/// The protocol's name in the `Upgrade` header.
pub const PROTOCOL: &str = "migrator-exec/1";

/// Longest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecFrame {
    /// Bytes for the command's stdin.
    Stdin(Bytes),
    /// No more stdin comes.
    StdinEnd,
    /// The terminal has a new size.
    Resize(TtySize),
    /// Send the command a signal.
    Signal(u32),
    /// Bytes of its stdout.
    Stdout(Bytes),
    /// Bytes of its stderr.
    Stderr(Bytes),
    /// It ended.
    Exited(i32),
    /// It could not be run or followed: JSON.
    Failed(Bytes),
}

/// What cannot be a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error("the exec stream failed")]
    Io(#[from] std::io::Error),
    /// A type that this version does not have.
    #[error("the exec stream has a frame of unknown type {0}")]
    Type(u8),
    /// A payload beyond [`MAX_PAYLOAD`], or of the wrong size for its type.
    #[error("the exec stream has a frame of type {0} with {1} bytes")]
    Length(u8, usize),
}

/// Cuts a byte stream into frames and back.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecCodec;

impl Decoder for ExecCodec {
    type Item = ExecFrame;
    type Error = FrameError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<ExecFrame>, FrameError> {
        let mut head: &[u8] = src;
        if head.len() < 5 {
            return Ok(None);
        }
        let kind = head.get_u8();
        let length = usize::try_from(head.get_u32_le()).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD {
            return Err(FrameError::Length(kind, length));
        }
        if src.len() < 5 + length {
            src.reserve(5 + length - src.len());
            return Ok(None);
        }
        src.advance(5);
        let mut body = src.split_to(length).freeze();
        let sized = |expected: usize| {
            if length == expected {
                Ok(())
            } else {
                Err(FrameError::Length(kind, length))
            }
        };
        Ok(Some(match kind {
            1 => ExecFrame::Stdin(body),
            2 => {
                sized(0)?;
                ExecFrame::StdinEnd
            }
            3 => {
                sized(4)?;
                ExecFrame::Resize(TtySize {
                    rows: body.get_u16_le(),
                    cols: body.get_u16_le(),
                })
            }
            4 => {
                sized(4)?;
                ExecFrame::Signal(body.get_u32_le())
            }
            5 => ExecFrame::Stdout(body),
            6 => ExecFrame::Stderr(body),
            7 => {
                sized(4)?;
                ExecFrame::Exited(body.get_i32_le())
            }
            8 => ExecFrame::Failed(body),
            other => return Err(FrameError::Type(other)),
        }))
    }
}

impl Encoder<ExecFrame> for ExecCodec {
    type Error = FrameError;

    fn encode(&mut self, frame: ExecFrame, dst: &mut BytesMut) -> Result<(), FrameError> {
        let (kind, body): (u8, Bytes) = match frame {
            ExecFrame::Stdin(body) => (1, body),
            ExecFrame::StdinEnd => (2, Bytes::new()),
            ExecFrame::Resize(TtySize { rows, cols }) => {
                let mut body = BytesMut::with_capacity(4);
                body.put_u16_le(rows);
                body.put_u16_le(cols);
                (3, body.freeze())
            }
            ExecFrame::Signal(number) => (4, Bytes::copy_from_slice(&number.to_le_bytes())),
            ExecFrame::Stdout(body) => (5, body),
            ExecFrame::Stderr(body) => (6, body),
            ExecFrame::Exited(code) => (7, Bytes::copy_from_slice(&code.to_le_bytes())),
            ExecFrame::Failed(body) => (8, body),
        };
        if body.len() > MAX_PAYLOAD {
            return Err(FrameError::Length(kind, body.len()));
        }
        dst.reserve(5 + body.len());
        dst.put_u8(kind);
        // Bounded above, so it fits.
        dst.put_u32_le(u32::try_from(body.len()).unwrap_or(u32::MAX));
        dst.put(body);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(frame: ExecFrame) -> BytesMut {
        let mut out = BytesMut::new();
        ExecCodec.encode(frame, &mut out).unwrap();
        out
    }

    #[test]
    fn golden_bytes() {
        let cases: [(ExecFrame, &[u8]); 8] = [
            (
                ExecFrame::Stdin(Bytes::from_static(b"hi")),
                &[1, 2, 0, 0, 0, b'h', b'i'],
            ),
            (ExecFrame::StdinEnd, &[2, 0, 0, 0, 0]),
            (
                ExecFrame::Resize(TtySize {
                    rows: 24,
                    cols: 256,
                }),
                &[3, 4, 0, 0, 0, 24, 0, 0, 1],
            ),
            (ExecFrame::Signal(15), &[4, 4, 0, 0, 0, 15, 0, 0, 0]),
            (
                ExecFrame::Stdout(Bytes::from_static(b"o")),
                &[5, 1, 0, 0, 0, b'o'],
            ),
            (
                ExecFrame::Stderr(Bytes::from_static(b"e")),
                &[6, 1, 0, 0, 0, b'e'],
            ),
            (
                ExecFrame::Exited(-1),
                &[7, 4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            ),
            (
                ExecFrame::Failed(Bytes::from_static(b"{}")),
                &[8, 2, 0, 0, 0, b'{', b'}'],
            ),
        ];
        for (frame, bytes) in cases {
            let mut encoded = encode(frame.clone());
            assert_eq!(&encoded[..], bytes, "{frame:?}");
            assert_eq!(ExecCodec.decode(&mut encoded).unwrap(), Some(frame));
            assert!(encoded.is_empty());
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_it_is_allocated() {
        let mut bytes = BytesMut::from(&[5, 0xff, 0xff, 0xff, 0xff][..]);
        assert!(matches!(
            ExecCodec.decode(&mut bytes),
            Err(FrameError::Length(5, _))
        ));
        assert!(bytes.capacity() < MAX_PAYLOAD);
    }

    proptest! {
        #[test]
        fn junk_never_panics(junk in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = BytesMut::from(&junk[..]);
            while let Ok(Some(_)) = ExecCodec.decode(&mut bytes) {}
        }

        #[test]
        fn a_frame_in_pieces_comes_out_whole(data in proptest::collection::vec(any::<u8>(), 0..512), cut in 0usize..517) {
            let whole = encode(ExecFrame::Stdout(Bytes::from(data.clone())));
            let (first, second) = whole.split_at(cut.min(whole.len()));
            let mut bytes = BytesMut::from(first);
            let early = ExecCodec.decode(&mut bytes).unwrap();
            if second.is_empty() {
                prop_assert_eq!(early, Some(ExecFrame::Stdout(Bytes::from(data))));
            } else {
                prop_assert_eq!(early, None);
                bytes.extend_from_slice(second);
                prop_assert_eq!(ExecCodec.decode(&mut bytes).unwrap(), Some(ExecFrame::Stdout(Bytes::from(data))));
            }
        }
    }
}
