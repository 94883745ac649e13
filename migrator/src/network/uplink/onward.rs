//! Late frames of a departed pod that the uplink's program sends on itself: which slots' frames, with which headers, by which device.

use std::io;

use aya::Ebpf;
use aya::maps::MapError;
use aya::programs::{TestRun, TestRunAttrs, TestRunOptions, Xdp};
use migrator_ebpf::{Outer, names};

use super::{FastWay, features};
use crate::network::error::GateError;
use crate::network::gate::lock;

/// linux/bpf.h: only in place of an entry that is there.
const BPF_EXIST: u64 = 2;

impl FastWay {
    /// Why no frame of a departed pod can go this way, if none can.
    pub(crate) fn no_way_on(&self) -> Option<String> {
        let Some(open) = self.open.get() else {
            return Some("frames take no fast way from the uplink (`uplink_path`)".to_owned());
        };
        open.no_way_on.clone()
    }

    /// The slot's frames get these headers and leave by their device, in TUNNEL. Only before the gate's word is that.
    pub(crate) fn set_outer(&self, slot: u16, outer: Outer) -> Result<(), GateError> {
        self.lead_out(outer.device)?;
        lock(&self.outers)
            .insert(u32::from(slot), outer, 0)
            .map_err(|source| self.error(names::OUTERS, source.into()))
    }

    /// Other headers of the same slot, in any mode: the way to the node has changed. False: it has none, or the same.
    pub(crate) fn change_outer(&self, slot: u16, outer: Outer) -> Result<bool, GateError> {
        let slot = u32::from(slot);
        let mut outers = lock(&self.outers);
        match outers.get(&slot, 0) {
            Ok(before) if before != outer => {}
            Ok(_) | Err(_) => return Ok(false),
        }
        self.lead_out(outer.device)?;
        match outers.insert(slot, outer, BPF_EXIST) {
            Ok(()) => Ok(true),
            // Released just now.
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                Ok(false)
            }
            Err(source) => Err(self.error(names::OUTERS, source.into())),
        }
    }

    /// The slot's frames take the kernel's tunnel, or none. Only while the gate's word is not TUNNEL. What is gone already is fine.
    pub(crate) fn forget_outer(&self, slot: u16) -> Result<(), GateError> {
        match lock(&self.outers).remove(&u32::from(slot)) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                Ok(())
            }
            Err(source) => Err(self.error(names::OUTERS, source.into())),
        }
    }

    /// Whether the slot's frames go this way in TUNNEL.
    pub(crate) fn has_outer(&self, slot: u16) -> bool {
        lock(&self.outers).get(&u32::from(slot), 0).is_ok()
    }

    /// The device's driver takes redirected frames. A kernel that cannot say is believed to: the probe finds out.
    pub(crate) fn takes_redirected(device: u32) -> bool {
        features::takes_redirected(device).unwrap_or(true)
    }

    fn lead_out(&self, device: u32) -> Result<(), GateError> {
        let program = self.open.get().map(|open| &open.onto_wire);
        lock(&self.ways_out)
            .insert(device, device, program, 0)
            .map_err(|source| self.error(names::WAYS_OUT, source.into()))
    }

    /// Has the uplink's program send one frame, by which it knows a question of this service's.
    pub(crate) fn ask(programs: &Ebpf, frame: &[u8]) -> io::Result<()> {
        let program = programs.program(names::UPLINK);
        let program: &Xdp = program
            .ok_or(io::ErrorKind::NotFound)?
            .try_into()
            .map_err(io::Error::other)?;
        program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                // It really goes out.
                attrs: TestRunAttrs::new().xdp_live_frames(1),
                ..TestRunOptions::default()
            })
            .map(drop)
            .map_err(io::Error::other)
    }
}
