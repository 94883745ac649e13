//! Frames that the kernel makes as if a device had received them (live frames of `BPF_PROG_TEST_RUN`, Documentation/bpf/bpf_prog_run.rst): the uplink's
//! program runs on them, and they go where it says. So one CPU does all that is measured, without a sender's system calls.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::programs::{ProgramFd, TestRun, TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use migrator_ebpf::names;
use nix::net::if_::if_nametoindex;

use crate::frames::checksum;
use crate::ground::{Ground, UPLINK};
use crate::schedule::cpu_time;

/// IANA's protocol numbers.
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
/// Shortest Ethernet frame, without its checksum.
pub(crate) const FRAME: usize = 60;
/// Frames of a run: fewer than a TAP's queue holds.
pub(crate) const FRAMES: u32 = 50_000;
/// Frames that the kernel makes at a time: a NAPI poll's.
const BATCH: u32 = 64;

/// The uplink's program over the node's own maps.
pub(crate) struct Live {
    programs: Ebpf,
}

/// How long a run took, and how much of this thread's CPU: the soft interrupts are in both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    time: Duration,
    cpu: Duration,
}

impl Took {
    /// Nothing yet.
    pub(crate) const NONE: Took = Took {
        time: Duration::ZERO,
        cpu: Duration::ZERO,
    };

    /// One after the other.
    pub(crate) fn and(self, other: Took) -> Took {
        Took {
            time: self.time + other.time,
            cpu: self.cpu + other.cpu,
        }
    }

    /// By frame, of so many.
    pub(crate) fn figures(self, frames: u32) -> Vec<(&'static str, f64)> {
        vec![
            ("rate", f64::from(frames) / self.time.as_secs_f64()),
            ("CPU time", self.cpu.as_nanos() as f64 / f64::from(frames)),
        ]
    }
}

impl Live {
    /// Loads it.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub(crate) fn load(ground: &Ground) -> Result<Live> {
        let mut programs = EbpfLoader::new()
            .default_map_pin_directory(ground.pins())
            .load(migrator::network::PROGRAMS)?;
        let program = programs.program_mut(names::UPLINK).context("the program")?;
        let uplink: &mut Xdp = program.try_into()?;
        uplink.load()?;
        let program = programs.program_mut(names::ONTO_WIRE).context("it")?;
        let onto_wire: &mut Xdp = program.try_into()?;
        onto_wire.load()?;
        Ok(Live { programs })
    }

    /// The program that runs for each frame that leaves the node by XDP.
    ///
    /// # Errors
    /// It is not there.
    pub(crate) fn onto_wire(&self) -> Result<&ProgramFd> {
        let program = self.programs.program(names::ONTO_WIRE).context("it")?;
        let onto_wire: &Xdp = program.try_into()?;
        Ok(onto_wire.fd()?)
    }

    /// Has [`FRAMES`] frames come in by the uplink. Inside the node.
    ///
    /// # Errors
    /// The kernel does not make them.
    pub(crate) fn receive(&self, frame: &[u8]) -> Result<Took> {
        self.receive_by(UPLINK, frame, FRAMES)
    }

    /// Has `count` frames come in by a device: the program passes what is for no pod. Inside the node.
    ///
    /// # Errors
    /// The kernel does not make them.
    pub(crate) fn receive_by(&self, device: &str, frame: &[u8], count: u32) -> Result<Took> {
        let program = self.programs.program(names::UPLINK).context("it")?;
        let uplink: &Xdp = program.try_into()?;
        // linux/bpf.h `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, if_nametoindex(device)?, 0, 0];
        let context: Vec<u8> = context.into_iter().flat_map(u32::to_ne_bytes).collect();
        let (begun, before) = (Instant::now(), cpu_time()?);
        uplink.test_run(TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            repeat: count,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::default()
        })?;
        Ok(Took {
            time: begun.elapsed(),
            cpu: cpu_time()? - before,
        })
    }
}

/// A frame of [`FRAME`] bytes.
pub(crate) fn frame(to: [u8; 6], ip: [u8; 4], protocol: u8) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([0x52, 0x54, 0, 0, 0, 1, 0x08, 0x00]);
    frame.extend([0x45, 0, 0, 46, 0, 1, 0x40, 0, 64, protocol]);
    frame.extend([0, 0, 10, 77, 0, 1]);
    frame.extend(ip);
    frame.extend([0x13, 0x88, 0, 7, 0, 26]);
    frame.resize(FRAME, 0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}
