//! The log of a switchover: what the source parked, numbered, and the order in which the destination
//! takes it. Pure: no clock, no descriptor.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

/// First number of the frames that the gate parked. What is left in the TAP is read only after the
/// guest has stopped, when parked frames are on their way already, and yet belongs before them: it has
/// the numbers below.
pub const FIRST_FRAME_SEQ: u64 = 1 << 32;

/// Stands for the end of the residue, whatever its number: everything below it has been dealt with.
const RESIDUE_DONE: u64 = FIRST_FRAME_SEQ - 1;

/// First number of all.
pub const FIRST_SEQ: u64 = 1;

/// What an item of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogKind {
    /// A frame that the gate had passed and the guest never read.
    Residue,
    /// A frame that the gate parked.
    Frame,
    /// No residue follows; its number is the one after the last residue's.
    ResidueEnd,
    /// The network sends to the new place: the frames that took the old way and belong before those
    /// that took the new one have all been logged.
    End,
}

/// One item of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogItem {
    /// Its number. Residue counts from [`FIRST_SEQ`], everything else from [`FIRST_FRAME_SEQ`].
    pub seq: u64,
    /// What it is.
    pub kind: LogKind,
    /// `struct virtio_net_hdr` (10 bytes), then the Ethernet frame. Empty for the two ends.
    pub frame: Bytes,
}

/// A frame that the source keeps until it is acknowledged.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) seq: u64,
    pub(crate) frame: Bytes,
    /// The bucket that waits for it, if the gate parked it.
    pub(crate) bucket: Option<u8>,
}

/// The source's side: numbers the items, and keeps the frames.
#[derive(Debug)]
pub(crate) struct SourceLog {
    next_residue: u64,
    next_frame: u64,
    residue: VecDeque<Kept>,
    frames: VecDeque<Kept>,
    /// Numbers of the two ends, so that they can be sent again.
    residue_end: Option<u64>,
    end: Option<u64>,
    /// Everything up to here is with the destination.
    acknowledged: u64,
    kept_bytes: usize,
}

impl SourceLog {
    pub(crate) fn new() -> Self {
        Self {
            next_residue: FIRST_SEQ,
            next_frame: FIRST_FRAME_SEQ,
            residue: VecDeque::new(),
            frames: VecDeque::new(),
            residue_end: None,
            end: None,
            acknowledged: 0,
            kept_bytes: 0,
        }
    }

    /// The log that a former service has left, with the buckets of its items. Everything up to `dealt_with` is with the
    /// destination or the guest already, and only its numbers count.
    pub(crate) fn restored(
        records: impl IntoIterator<Item = (LogItem, Option<u8>)>,
        dealt_with: u64,
    ) -> Self {
        let mut log = Self::new();
        log.next_frame = log.next_frame.max(dealt_with.saturating_add(1));
        log.acknowledged = dealt_with;
        for (item, bucket) in records {
            let LogItem { seq, kind, frame } = item;
            let kept = Kept { seq, frame, bucket };
            let (next, queue) = match kind {
                LogKind::ResidueEnd => {
                    log.residue_end = Some(seq);
                    continue;
                }
                LogKind::End => {
                    log.end = Some(seq);
                    log.next_frame = log.next_frame.max(seq.saturating_add(1));
                    continue;
                }
                LogKind::Residue => (&mut log.next_residue, &mut log.residue),
                LogKind::Frame => (&mut log.next_frame, &mut log.frames),
            };
            *next = (*next).max(seq.saturating_add(1));
            if seq > dealt_with && !kept.frame.is_empty() {
                log.kept_bytes += kept.frame.len();
                queue.push_back(kept);
            }
        }
        log
    }

    /// What [`restored`](Self::restored) needs to go on when no frame is kept: the ends, and the last number given out.
    pub(crate) fn marks(&self) -> Vec<LogItem> {
        let residue_end = self.residue_end.map(|seq| mark(seq, LogKind::ResidueEnd));
        let end = self.end.map(|seq| mark(seq, LogKind::End));
        let last = mark(self.last(), LogKind::Frame);
        let last = (last.seq >= FIRST_FRAME_SEQ).then_some(last);
        [residue_end, end, last].into_iter().flatten().collect()
    }

    /// The last number given out to a frame or to the end; below [`FIRST_FRAME_SEQ`] if there was none.
    pub(crate) fn last(&self) -> u64 {
        self.next_frame - 1
    }

    /// The number of the frame that is parked next.
    pub(crate) fn next_frame(&self) -> u64 {
        self.next_frame
    }

    /// The number of the next frame that is left in the TAP.
    pub(crate) fn next_residue(&self) -> u64 {
        self.next_residue
    }

    /// Whether a number is a packet's of this log, or was.
    pub(crate) fn has_given_out(&self, number: u64) -> bool {
        match number < FIRST_FRAME_SEQ {
            true => number < self.next_residue,
            false => number < self.next_frame,
        }
    }

    /// How many of the frames kept wait in a bucket, and how many came out of the TAP.
    pub(crate) fn kept_from(&self) -> (u64, u64) {
        let kept = self.residue.iter().chain(&self.frames);
        let parked = kept.filter(|kept| kept.bucket.is_some()).count();
        (parked as u64, (self.len() - parked) as u64)
    }

    /// Numbers a frame that the gate parked, and does not keep it.
    pub(crate) fn numbered(&mut self, frame: Bytes) -> LogItem {
        let seq = self.next_frame;
        self.next_frame += 1;
        LogItem {
            seq,
            kind: LogKind::Frame,
            frame,
        }
    }

    /// Appends a frame that the gate parked.
    pub(crate) fn frame(&mut self, frame: Bytes, bucket: u8) -> LogItem {
        let item = self.numbered(frame);
        self.kept_bytes += item.frame.len();
        self.frames.push_back(Kept {
            seq: item.seq,
            frame: item.frame.clone(),
            bucket: Some(bucket),
        });
        item
    }

    /// Appends a frame that never reached the guest: left in the TAP, or (with its bucket) on the way there.
    pub(crate) fn residue(&mut self, frame: Bytes, bucket: Option<u8>) -> LogItem {
        let seq = self.next_residue;
        self.next_residue += 1;
        self.kept_bytes += frame.len();
        self.residue.push_back(Kept {
            seq,
            frame: frame.clone(),
            bucket,
        });
        LogItem {
            seq,
            kind: LogKind::Residue,
            frame,
        }
    }

    /// Closes the residue; `None` if it was closed before.
    pub(crate) fn residue_end(&mut self) -> Option<LogItem> {
        if self.residue_end.is_some() {
            return None;
        }
        let seq = self.next_residue;
        self.residue_end = Some(seq);
        Some(mark(seq, LogKind::ResidueEnd))
    }

    /// Appends the end marker; `None` if there is one already.
    pub(crate) fn end(&mut self) -> Option<LogItem> {
        if self.end.is_some() {
            return None;
        }
        let seq = self.next_frame;
        self.next_frame += 1;
        self.end = Some(seq);
        Some(mark(seq, LogKind::End))
    }

    /// Whether the end marker was appended.
    pub(crate) fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether the destination has injected everything up to the end marker.
    pub(crate) fn end_acknowledged(&self) -> bool {
        self.end.is_some_and(|end| end <= self.acknowledged)
    }

    /// Forgets what the destination has: everything up to `seq`. A number that was never given out
    /// frees no more than there is.
    pub(crate) fn ack(&mut self, seq: u64) -> Vec<Kept> {
        // It cannot have more than it was given.
        self.acknowledged = self.acknowledged.max(seq.min(self.last()));
        let mut freed = Vec::new();
        for queue in [&mut self.residue, &mut self.frames] {
            while queue.front().is_some_and(|kept| kept.seq <= seq) {
                freed.extend(queue.pop_front());
            }
        }
        self.kept_bytes -= freed.iter().map(|kept| kept.frame.len()).sum::<usize>();
        freed
    }

    /// Everything that is kept, in order; the log is empty afterwards.
    pub(crate) fn take_all(&mut self) -> Vec<Kept> {
        self.kept_bytes = 0;
        self.residue
            .drain(..)
            .chain(self.frames.drain(..))
            .collect()
    }

    /// The items to send again on a new connection: what was not acknowledged, and the ends.
    pub(crate) fn unacknowledged(&self) -> Vec<LogItem> {
        let item = |kept: &Kept, kind| LogItem {
            seq: kept.seq,
            kind,
            frame: kept.frame.clone(),
        };
        let mut items: Vec<LogItem> = Vec::new();
        items.extend(self.residue.iter().map(|k| item(k, LogKind::Residue)));
        items.extend(self.residue_end.map(|seq| mark(seq, LogKind::ResidueEnd)));
        items.extend(self.frames.iter().map(|k| item(k, LogKind::Frame)));
        items.extend(self.end.map(|seq| mark(seq, LogKind::End)));
        items.sort_by_key(|item| item.seq);
        items
    }

    /// Frames kept.
    pub(crate) fn len(&self) -> usize {
        self.residue.len() + self.frames.len()
    }

    /// Their bytes.
    pub(crate) fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }
}

fn mark(seq: u64, kind: LogKind) -> LogItem {
    LogItem {
        seq,
        kind,
        frame: Bytes::new(),
    }
}

/// The destination's side: puts items in order, once each, the residue before everything.
#[derive(Debug)]
pub(crate) struct InboundLog {
    next_residue: u64,
    /// The residue is complete.
    residue_ended: bool,
    next_frame: u64,
    waiting: BTreeMap<u64, LogItem>,
}

impl InboundLog {
    pub(crate) fn new() -> Self {
        Self {
            next_residue: FIRST_SEQ,
            residue_ended: false,
            next_frame: FIRST_FRAME_SEQ,
            waiting: BTreeMap::new(),
        }
    }

    /// Goes on where another has stopped: `seq` is what [`InboundLog::mark`] said of the last item that it gave out.
    pub(crate) fn resumed(seq: u64) -> Self {
        let mut log = Self::new();
        if seq >= RESIDUE_DONE {
            log.residue_ended = true;
            // The last number of all stands for a departure whose log was in memory only.
            log.next_frame = seq.saturating_add(1);
        } else {
            log.next_residue = seq + 1;
        }
        log
    }

    /// What to remember once an item was dealt with.
    pub(crate) fn mark(kind: LogKind, seq: u64) -> u64 {
        match kind {
            LogKind::ResidueEnd => RESIDUE_DONE,
            LogKind::Residue | LogKind::Frame | LogKind::End => seq,
        }
    }

    /// Takes an item from the wire. False: it was here before, or its number does not fit its kind.
    pub(crate) fn push(&mut self, item: LogItem) -> bool {
        let low = item.seq < FIRST_FRAME_SEQ;
        let next = if low {
            self.next_residue
        } else {
            self.next_frame
        };
        let fits = match item.kind {
            LogKind::Residue | LogKind::ResidueEnd => low,
            LogKind::Frame | LogKind::End => !low,
        };
        if !fits || item.seq < next || self.waiting.contains_key(&item.seq) {
            return false;
        }
        self.waiting.insert(item.seq, item);
        true
    }

    /// The next item whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<LogItem> {
        let next = if self.residue_ended {
            &mut self.next_frame
        } else {
            &mut self.next_residue
        };
        let item = self.waiting.remove(next)?;
        *next += 1;
        if item.kind == LogKind::ResidueEnd {
            self.residue_ended = true;
            // Numbers beyond the end were never the source's.
            self.waiting = self.waiting.split_off(&FIRST_FRAME_SEQ);
        }
        Some(item)
    }

    /// Frames that wait for their turn.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
            .values()
            .filter(|i| !i.frame.is_empty())
            .count()
    }
}

#[cfg(test)]
mod tests;
