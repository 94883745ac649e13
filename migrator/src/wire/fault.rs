//! What crosses a fault connection: which page somebody waits for, and the page.

use bytes::Bytes;
use vm_runtime::units::{PAGE_SIZE, PageIndex};

use crate::wire::codec::{DecodeError, Message, split_u64};
use crate::wire::frame::Lane;

/// Pages that one `Pages` frame may hold: 64 KiB.
pub const MAX_PAGES: usize = 16;

const REQUEST: u8 = 0x71;
const PAGES: u8 = 0x72;

/// A message of a fault connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Destination to source: somebody waits for this page. `u64` page.
    Request {
        /// The page.
        page: PageIndex,
    },
    /// Source to destination: consecutive pages, 1 to [`MAX_PAGES`], as the stopped guest has them. `u64` first, raw.
    Pages {
        /// The first page.
        first: PageIndex,
        /// Their content.
        raw: Bytes,
    },
}

impl Message for Fault {
    const LANE: Lane = Lane::Fault;

    fn kind(&self) -> u8 {
        match self {
            Self::Request { .. } => REQUEST,
            Self::Pages { .. } => PAGES,
        }
    }

    fn head(&self, out: &mut Vec<u8>) {
        let (Self::Request { page } | Self::Pages { first: page, .. }) = self;
        out.extend_from_slice(&page.0.to_le_bytes());
    }

    fn tail(&self) -> &[u8] {
        match self {
            Self::Request { .. } => &[],
            Self::Pages { raw, .. } => raw,
        }
    }

    fn decode(kind: u8, mut payload: Bytes) -> Result<Self, DecodeError> {
        match kind {
            REQUEST => {
                let page = PageIndex(split_u64("Request", &mut payload)?);
                payload
                    .is_empty()
                    .then_some(Self::Request { page })
                    .ok_or(DecodeError::Malformed("Request"))
            }
            PAGES => {
                let first = PageIndex(split_u64("Pages", &mut payload)?);
                let whole = payload.len().is_multiple_of(PAGE_SIZE);
                let count = payload.len() / PAGE_SIZE;
                (whole && (1..=MAX_PAGES).contains(&count))
                    .then_some(Self::Pages {
                        first,
                        raw: payload,
                    })
                    .ok_or(DecodeError::Malformed("Pages"))
            }
            kind => Err(DecodeError::UnknownType {
                lane: Lane::Fault,
                kind,
            }),
        }
    }
}
