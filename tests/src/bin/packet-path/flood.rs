//! A program that has the kernel make numbered frames at a steady pace, and give them to a veth as if another device had received them.
//!
//! A sender's system call for each frame, and the soft interrupt that each of these raises, take a CPU more than 3 us a frame. Live frames
//! of `BPF_PROG_TEST_RUN` come to the other end in batches, as they do out of the queue of a physical device. One call makes all of them, since the
//! kernel takes 20 ms to begin and to end one; so the program itself waits until a batch is due, and drops the frames once it is told to stop.

use std::time::Duration;

use anyhow::{Context, Result};
use migrator_tests::bpf::{Map, MapType, Program, immediate, instruction};
use nix::net::if_::if_nametoindex;

use crate::frames::Frames;
use crate::sender::Sent;

/// Frames that the kernel makes at a time.
const BATCH: u32 = 16;
/// Frames at most: one second's.
const FRAMES_MAX: u32 = 300_000;
/// Looks at the clock before a batch is sent, late or not. More than the pace needs; the verifier walks through all of them.
const LOOKS: i32 = 4_000;

/// What the program and its starter share, as numbers of eight bytes.
const NEXT: i16 = 0;
/// When the first batch was sent, and the last one, in nanoseconds of the monotonic clock.
const FIRST_AT: i16 = 8;
const LAST_AT: i16 = 16;
const STATE: usize = 24;

/// linux/bpf.h: `XDP_DROP`, and the numbers of the helpers.
const DROP: i32 = 1;
const KTIME_GET_NS: i32 = 5;
const REDIRECT: i32 = 23;
/// Of an Ethernet frame with an IPv4 packet: its checksum, and the last byte of its source.
const SUM_AT: i16 = 24;
const FLOW_AT: i16 = 29;

/// Makes the frames of [`Frames`], numbered from 0.
pub(crate) struct Flood {
    program: Program,
    state: Map<STATE>,
    stop: Map<8>,
    frame: Vec<u8>,
    device: u32,
}

impl Flood {
    /// Out of a device of this network namespace, `rate` frames a second.
    ///
    /// # Errors
    /// The kernel lacks something.
    pub(crate) fn new(frames: &Frames, device: &str, rate: u64) -> Result<Flood> {
        let device = if_nametoindex(device)?;
        let state = Map::<STATE>::new(MapType::Array, 1)?;
        let stop = Map::<8>::new(MapType::Array, 1)?;
        let (frame, number_at) = frames.first();
        let maps = (immediate(&state), immediate(&stop));
        let instructions = generator(frame, number_at as i16, maps, device as i32, rate);
        let program = Program::load(&instructions).context("the kernel takes no generator")?;
        Ok(Flood {
            program,
            state,
            stop,
            frame: frame.to_vec(),
            device,
        })
    }

    /// Makes them until it is told to stop.
    ///
    /// # Errors
    /// The kernel does not.
    pub(crate) fn run(&self) -> Result<()> {
        let made = self
            .program
            .live(&self.frame, self.device, FRAMES_MAX, BATCH);
        made.context("the kernel makes no frames")
    }

    /// Tells it to.
    ///
    /// # Errors
    /// The kernel does not take the word.
    pub(crate) fn stop(&self) -> Result<()> {
        Ok(self.stop.set(0, 1u64.to_ne_bytes())?)
    }

    /// What it has made.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn sent(&self) -> Result<Sent> {
        let state = self.state.get(0)?;
        let number = |at: i16| -> u64 {
            let bytes = state[at as usize..].first_chunk::<8>();
            bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
        };
        let frames = number(NEXT);
        // The last batch was begun then.
        let whole = frames.saturating_sub(1) / u64::from(BATCH) * u64::from(BATCH);
        let nanos = number(LAST_AT).saturating_sub(number(FIRST_AT));
        let nanos = nanos as f64 * frames as f64 / whole.max(1) as f64;
        Ok(Sent {
            frames,
            took: Duration::from_nanos(nanos as u64),
        })
    }
}

/// Everything that differs between two frames is written: a frame's page comes back with what a former one had.
fn generator(
    frame: &[u8],
    number_at: i16,
    (state, stop): (i32, i32),
    device: i32,
    rate: u64,
) -> Vec<u64> {
    let sum_at = SUM_AT as usize;
    // RFC 1624: another flow's source is larger by its number, and the sum of the first one has room for that.
    let sum = u16::from_be_bytes([frame[sum_at], frame[sum_at + 1]]);
    let end = i32::from(number_at) + 8;
    let pace = (1_000_000_000 / rate) as i32;
    let i = instruction;
    vec![
        i(0xbf, 6, 1, 0, 0),                // r6 = context
        i(0x18, 7, 2, 0, stop),             // r7 = the address of the word
        i(0, 0, 0, 0, 0),                   //
        i(0x79, 1, 7, 0, 0),                // r1 = the word
        i(0x55, 1, 0, 44, 0),               // if r1 != 0: drop
        i(0x18, 7, 2, 0, state),            // r7 = the address of the state
        i(0, 0, 0, 0, 0),                   //
        i(0x79, 8, 7, NEXT, 0),             // r8 = number
        i(0xbf, 1, 8, 0, 0),                // r1 = r8
        i(0x57, 1, 0, 0, BATCH as i32 - 1), // r1 &= 15
        i(0x55, 1, 0, 17, 0),               // if r1 != 0: make
        i(0x85, 0, 0, 0, KTIME_GET_NS),     // r0 = now
        i(0x79, 9, 7, FIRST_AT, 0),         // r9 = when it began
        i(0x55, 9, 0, 3, 0),                // if r9 == 0:
        i(0x7b, 7, 0, FIRST_AT, 0),         //     it began now
        i(0x7b, 7, 0, LAST_AT, 0),          //
        i(0x05, 0, 0, 11, 0),               //     make
        i(0xbf, 1, 8, 0, 0),                // r1 = r8
        i(0x27, 1, 0, 0, pace),             // r1 *= pace
        i(0x0f, 9, 1, 0, 0),                // r9 += r1: due
        i(0xb7, 7, 0, 0, 0),                // r7 = 0
        i(0x85, 0, 0, 0, KTIME_GET_NS),     // look: r0 = now
        i(0x3d, 0, 9, 2, 0),                // if r0 >= r9: it is time
        i(0x07, 7, 0, 0, 1),                // r7 += 1
        i(0xa5, 7, 0, -4, LOOKS),           // if r7 < LOOKS: look
        i(0x18, 7, 2, 0, state),            // r7 = the address of the state
        i(0, 0, 0, 0, 0),                   //
        i(0x7b, 7, 0, LAST_AT, 0),          // the last batch begins now
        i(0x61, 2, 6, 0, 0),                // make: r2 = data
        i(0x61, 3, 6, 4, 0),                // r3 = data_end
        i(0xbf, 4, 2, 0, 0),                // r4 = r2
        i(0x07, 4, 0, 0, end),              // r4 += end
        i(0x2d, 4, 3, 16, 0),               // if r4 > r3: drop
        i(0xbf, 3, 8, 0, 0),                // r3 = r8
        i(0x07, 3, 0, 0, 1),                // r3 += 1
        i(0x7b, 7, 3, NEXT, 0),             // the next number = r3
        i(0xbf, 3, 8, 0, 0),                // r3 = r8
        i(0x57, 3, 0, 0, 7),                // r3 &= 7: the flow
        i(0x73, 2, 3, FLOW_AT, 0),          // the source's last byte = r3
        i(0xb7, 4, 0, 0, i32::from(sum)),   // r4 = sum of the first flow
        i(0x1f, 4, 3, 0, 0),                // r4 -= r3
        i(0xdc, 4, 0, 0, 16),               // r4 = big endian
        i(0x6b, 2, 4, SUM_AT, 0),           // sum = r4
        i(0xdc, 8, 0, 0, 64),               // r8 = big endian
        i(0x7b, 2, 8, number_at, 0),        // number = r8
        i(0xb7, 1, 0, 0, device),           // r1 = device
        i(0xb7, 2, 0, 0, 0),                // r2 = 0
        i(0x85, 0, 0, 0, REDIRECT),         // r0 = bpf_redirect(r1, r2)
        i(0x95, 0, 0, 0, 0),                // exit
        i(0xb7, 0, 0, 0, DROP),             // drop: r0 = XDP_DROP
        i(0x95, 0, 0, 0, 0),                // exit
    ]
}
