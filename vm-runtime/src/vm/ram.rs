//! A VM's RAM without its monitor: a VMM whose own threads wait for a page answers nobody.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::process::Process;
use super::record::VmRecord;
use super::{AttachError, Vm};
use crate::memory::GuestMemory;

/// Guest RAM, and the descriptor that its missing pages are asked of.
#[derive(Clone, Debug)]
pub struct VmRam {
    pid: i32,
    memory: Arc<GuestMemory>,
    uffd: Arc<OwnedFd>,
}

impl VmRam {
    /// QEMU's process number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Guest RAM.
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    /// The userfaultfd of QEMU's address space, past its handshake.
    pub fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl Vm {
    /// Its RAM.
    ///
    /// # Errors
    /// This process has too many descriptors.
    pub fn ram(&self) -> io::Result<VmRam> {
        Ok(VmRam {
            pid: self.pid(),
            memory: self.memory(),
            uffd: Arc::new(self.uffd().try_clone_to_owned()?),
        })
    }
}

impl VmRecord {
    /// The RAM of the VM that an earlier service started; its monitor is not asked.
    ///
    /// # Errors
    /// Its process is gone, or its descriptors cannot be taken.
    pub fn ram(&self) -> Result<VmRam, AttachError> {
        let pid = self.pid;
        let failed = |what| move |source| AttachError::Descriptor { what, pid, source };
        let process = match Process::find(pid, self.start_time) {
            Ok(process) => process,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(AttachError::Gone { pid });
            }
            Err(source) => return Err(failed("process")(source)),
        };
        let take = |what, number| process.get_fd(number).map_err(failed(what));
        let memory = GuestMemory::from_fd(take("guest memory", self.fds.memory)?);
        Ok(VmRam {
            pid,
            memory: Arc::new(memory.map_err(failed("guest memory"))?),
            uffd: Arc::new(take("userfaultfd", self.fds.uffd)?),
        })
    }
}
