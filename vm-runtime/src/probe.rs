//! Which accelerator works here, found out by trying.
//!
//! `/dev/kvm` may open and even make a virtual machine, and still be unable to run a guest (a nested
//! hypervisor that lacks registers, for one). So a VM of our machine and CPU model is started, and
//! its boot sector has to execute: it writes to QEMU's debug-exit port, which ends QEMU with a
//! status that nothing else gives.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::qemu::{QemuBinary, one_line};
use crate::spec::{Accel, AccelChoice, CPU, MACHINE};

/// The firmware reaches the boot sector in under a second, also emulated; a loaded host is slower.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);
/// Size of the disk that the sector is on, in bytes.
const BOOT_DISK: u64 = 1 << 20;
/// `mov dx, 0xf4; mov al, 0x10; out dx, al; hlt; jmp $-1`, 16-bit code.
const BOOT_CODE: [u8; 9] = [0xba, 0xf4, 0x00, 0xb0, 0x10, 0xee, 0xf4, 0xeb, 0xfd];
/// What isa-debug-exit makes of the 0x10: `(value << 1) | 1`.
const EXIT_STATUS: i32 = 0x21;

/// An accelerator does not work.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The device cannot be opened.
    #[error(
        "/dev/kvm cannot be opened ({source}): KVM needs hardware virtualisation, the kvm module, and root or the group kvm"
    )]
    NoDevice {
        /// Why not; also in the text, because it tells absent from forbidden.
        source: io::Error,
    },
    /// The probe itself failed.
    #[error("cannot {step} for the probe boot")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// QEMU ended otherwise than by the boot sector.
    #[error("a probe boot with {accel} failed ({status}): {said}")]
    Failed {
        /// What was tried.
        accel: Accel,
        /// How QEMU ended.
        status: String,
        /// The last it said.
        said: String,
    },
    /// The boot sector was not reached.
    #[error("a probe boot with {accel} did not get to its boot sector within {PROBE_DEADLINE:?}")]
    Hangs {
        /// What was tried.
        accel: Accel,
    },
}

/// KVM if a probe boot with it works, else the emulator; and the reason, for people.
pub async fn probe_accel(qemu: &QemuBinary) -> (Accel, String) {
    match try_accel(qemu, Accel::Kvm).await {
        Ok(()) => (Accel::Kvm, "a probe boot with KVM works".to_owned()),
        Err(error) => {
            let source = std::error::Error::source(&error);
            let cause = match (&error, source) {
                (ProbeError::System { .. }, Some(source)) => format!(": {source}"),
                _ => String::new(),
            };
            (Accel::Tcg, format!("emulating, because {error}{cause}"))
        }
    }
}

/// What the configuration asks for, resolved; and the reason, for people.
///
/// # Errors
/// KVM was asked for and does not work.
pub async fn resolve(
    qemu: &QemuBinary,
    choice: AccelChoice,
) -> Result<(Accel, String), ProbeError> {
    match choice {
        AccelChoice::Auto => Ok(probe_accel(qemu).await),
        AccelChoice::Tcg => Ok((Accel::Tcg, "the configuration says so".to_owned())),
        AccelChoice::Kvm => {
            try_accel(qemu, Accel::Kvm).await?;
            let reason = "the configuration says so, and a probe boot works";
            Ok((Accel::Kvm, reason.to_owned()))
        }
    }
}

/// Boots a sector with this accelerator.
///
/// # Errors
/// It does not get executed, and why.
pub async fn try_accel(qemu: &QemuBinary, accel: Accel) -> Result<(), ProbeError> {
    if accel == Accel::Kvm {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|source| ProbeError::NoDevice { source })?;
    }
    let mut sector = [0u8; 512];
    sector[..BOOT_CODE.len()].copy_from_slice(&BOOT_CODE);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let system = |step| move |source| ProbeError::System { step, source };
    let mut file = tempfile::NamedTempFile::new().map_err(system("make a boot sector"))?;
    file.write_all(&sector)
        .map_err(system("write the boot sector"))?;

    // The firmware wants a disk of some size; the rest of it is a hole.
    file.as_file()
        .set_len(BOOT_DISK)
        .map_err(system("write the boot sector"))?;

    let disk = serde_json::json!({
        "driver": "raw",
        "file": {"driver": "file", "filename": file.path(), "read-only": true},
        "node-name": "boot",
        "read-only": true,
    });
    let mut command = Command::new(&qemu.path);
    if let Some(dir) = &qemu.lib_dir {
        command.env("LD_LIBRARY_PATH", dir);
    }
    for dir in &qemu.data_dirs {
        command.arg("-L").arg(dir);
    }
    let machine = qemu.machine_or_newest(MACHINE);
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-m", "64"])
        .args(["-accel", accel_name(accel), "-cpu", CPU])
        .args([
            "-machine",
            &format!("{machine},hpet=on,vmport=off,smbus=off,sata=off"),
        ])
        .args(["-blockdev", &disk.to_string()])
        .args(["-device", "virtio-blk-pci,drive=boot"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = match timeout(PROBE_DEADLINE, command.output()).await {
        Ok(output) => output.map_err(system("run QEMU"))?,
        Err(_) => return Err(ProbeError::Hangs { accel }),
    };
    if output.status.code() == Some(EXIT_STATUS) {
        return Ok(());
    }
    let said = one_line(&String::from_utf8_lossy(&output.stderr));
    Err(ProbeError::Failed {
        accel,
        status: output.status.to_string(),
        said,
    })
}

/// QEMU's name of the accelerator.
fn accel_name(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    }
}
