//! Where a packet lands that the service reads: the kernel copies it straight into a file in memory, so that there is no moment at which it is
//! in no queue any more and only in the memory of a process that may be killed.
//!
//! ```text
//!   file    "mland01\n" | source u64 | header u64 | number u64 | zeros | area at 64                little endian
//!   source  0 the park, 1 the TAP            header  bytes of virtio-net header in front of its frames
//!   number  the one that the packet gets in the log; 0: it is injected, not logged; all bits set: it was dealt with
//!   area    FILL where nothing has landed
//! ```
//!
//! One packet is in it at a time: until it is in the spool, or in the TAP, or booked as dropped. The service that comes after one that was killed finds it
//! there. Whether it was dealt with by then, the spool says (its number was given out) or the gate (its program noted it).
//!
//! read(2) tells a packet's length to nobody but its caller. So it is read off the packet itself, or ends where the area has its old bytes again,
//! whichever is later: all of a packet of IP or ARP, with its padding. What another protocol loses are bytes at its end that look like [`FILL`].

mod end;
mod map;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::errno::Errno;

use super::sys::{FRAME_MAX, VNET_HEADER};
use map::Area;

const MAGIC: u64 = u64::from_le_bytes(*b"mland01\n");
/// What the area is filled with: no header of a packet looks like it (linux/virtio_net.h).
const FILL: u8 = 0xa5;
/// In the place of a number.
const DEALT_WITH: u64 = u64::MAX;
/// Room for the longest frame and any header.
const ROOM: usize = FRAME_MAX + 64;

/// What a packet was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Parked.
    Park,
    /// Left in the TAP by a guest that has stopped.
    Tap,
}

/// What is said of a packet before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) source: Source,
    /// Bytes of virtio-net header.
    pub(crate) header: usize,
    /// The number that it gets in the log; `None`: it is injected.
    pub(crate) number: Option<u64>,
}

/// The place of one slot. Without its file everything works as long as the service lives.
#[derive(Debug)]
pub(crate) struct Landing {
    path: PathBuf,
    area: Option<Area>,
    /// The file was tried, and is not there.
    gave_up: bool,
    /// For reads while the area is taken, or is not there.
    buffer: Box<[u8]>,
    /// Bytes of the packet in the area, and whether it is there for the service.
    used: usize,
    taken: bool,
}

impl Landing {
    /// The place of a slot, in folder `dir`. Touches nothing.
    pub(crate) fn new(dir: &Path, slot: u16) -> Self {
        Self {
            path: dir.join(format!("{slot}.landing")),
            area: None,
            gave_up: false,
            buffer: Box::default(),
            used: 0,
            taken: false,
        }
    }

    /// The packet that a former service has left there, and what it has said of it. It stays there, and the place is taken.
    pub(crate) fn left(&mut self) -> Option<(Bytes, Label)> {
        if !self.path.exists() {
            return None;
        }
        self.open();
        let area = self.area.as_mut()?;
        let (landed, dirty) = landed(area.room());
        let [magic, source, header, number] = area.words();
        let label = Label {
            source: match source {
                0 => Source::Park,
                _ => Source::Tap,
            },
            header: usize::try_from(header).unwrap_or(usize::MAX),
            number: (number != 0).then_some(number),
        };
        self.used = dirty;
        let bytes = area.room();
        let frame = bytes.get(label.header..);
        let (true, true, Some(frame)) = (landed, magic == MAGIC && number != DEALT_WITH, frame)
        else {
            self.clear();
            return None;
        };
        let end = dirty.max(label.header + end::of(frame));
        let packet = Bytes::copy_from_slice(&bytes[..end.min(bytes.len())]);
        self.taken = true;
        Some((packet, label))
    }

    fn open(&mut self) {
        if self.area.is_some() || self.gave_up {
            return;
        }
        match Area::open(&self.path) {
            Ok(area) => self.area = Some(area),
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&mut self, error: &io::Error) {
        self.gave_up = true;
        let path = self.path.display();
        tracing::warn!(%path, %error, "packets land in this service's memory only: one that it has just read is lost if it is killed");
    }

    /// Reads a packet, and takes the place; if that is taken, into the service's memory.
    pub(crate) fn read(&mut self, from: BorrowedFd<'_>, label: Label) -> Result<&[u8], Errno> {
        self.open();
        match &mut self.area {
            Some(area) if !self.taken => {
                area.set_words(words(label));
                let read = area.read(from)?;
                (self.used, self.taken) = (read, true);
                Ok(&area.room()[..read])
            }
            _ => {
                if self.buffer.is_empty() {
                    self.buffer = vec![0; ROOM].into_boxed_slice();
                }
                let read = map::read(from, &mut self.buffer)?;
                Ok(&self.buffer[..read])
            }
        }
    }

    /// The packet there is to be dealt with in another way than was said before.
    pub(crate) fn relabel(&mut self, label: Label) {
        if let Some(area) = &mut self.area {
            area.set_words(words(label));
        }
    }

    /// Whether there is a packet that is not dealt with.
    pub(crate) fn is_taken(&self) -> bool {
        self.taken
    }

    /// Whether the file is there.
    pub(crate) fn is_there(&self) -> bool {
        self.area.is_some()
    }

    /// The packet has been dealt with.
    pub(crate) fn clear(&mut self) {
        if !std::mem::take(&mut self.taken) && self.used == 0 {
            return;
        }
        if let Some(area) = &mut self.area {
            let [magic, source, header, _] = area.words();
            area.set_words([magic, source, header, DEALT_WITH]);
            area.fill(std::mem::take(&mut self.used));
        }
    }

    /// Removes the file.
    pub(crate) fn remove(&mut self) {
        self.area = None;
        (self.taken, self.used) = (false, 0);
        match std::fs::remove_file(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "could not remove the place of a packet");
            }
        }
    }
}

fn words(label: Label) -> [u64; 4] {
    let source = match label.source {
        Source::Park => 0,
        Source::Tap => 1,
    };
    let number = label.number.unwrap_or(0);
    [MAGIC, source, label.header as u64, number]
}

/// Whether a packet has landed, and how much of the area does not look as if nothing had.
fn landed(area: &[u8]) -> (bool, usize) {
    let is_dirty = |byte: &u8| *byte != FILL;
    let dirty = area.iter().rposition(is_dirty).map_or(0, |last| last + 1);
    (area.iter().take(VNET_HEADER).any(is_dirty), dirty)
}

#[cfg(test)]
mod tests;
