//! A folder, a TAP and a VM for a test, and the waiting for what the guest says.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, unshare};
use vm_runtime::initramfs::find_modules;
use vm_runtime::memory::{GuestMemory, is_zero, page_hash};
use vm_runtime::qemu::{QemuBinary, QemuConfig};
use vm_runtime::spec::{Accel, CPU, DiskSpec, KERNEL_CMDLINE, MACHINE, VmSpec};
use vm_runtime::units::{Bytes, PAGE_SIZE, PageIndex};
use vm_runtime::vm::{CONSOLE, SuccessorResources, Vm, VmRecord, VmResources};
use xtask::process::poll_until;

use crate::guest::{self, Program};

/// Under emulation on a busy machine a kernel takes this long at the very most.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// One virtual machine at a time: emulation needs the processor.
static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The file behind a VM's disk, in its folder.
const DISK: &str = "a disk, with a comma";

pub struct Lab {
    pub dir: tempfile::TempDir,
    console: PathBuf,
    pub qemu: QemuBinary,
    kernel: PathBuf,
    memory: Bytes,
    /// Whether its VMs are made of huge pages, which must have been reserved.
    pub hugepages: bool,
    _one: tokio::sync::MutexGuard<'static, ()>,
}

impl Lab {
    pub async fn new() -> anyhow::Result<Self> {
        Self::with(Program::Writes).await
    }

    /// As [`Lab::new`], with guests that do something else.
    pub async fn with(program: Program) -> anyhow::Result<Self> {
        let one = ONE.lock().await;
        let guest = std::env::var_os("MIGRATOR_GUEST_DIR").context(
            "MIGRATOR_GUEST_DIR is not set: run these tests with `cargo xtask test`, or let it name \
             a folder with a guest kernel `vmlinuz`",
        )?;
        let kernel = Path::new(&guest).join("vmlinuz");
        if !kernel.is_file() {
            bail!("{} is not there: run `cargo xtask setup`", kernel.display());
        }
        let dir = tempfile::Builder::new().prefix("vm-test-").tempdir()?;
        let modules = match program {
            Program::Hog => find_modules(&Path::new(&guest).join("modules"))?,
            Program::Writes | Program::Busy => Vec::new(),
        };
        guest::write_initramfs(&dir.path().join("initramfs"), program, &modules)?;
        Ok(Self {
            console: dir.path().join("vm"),
            dir,
            memory: match program {
                Program::Hog => Bytes(2 * guest::HOG_BYTES),
                Program::Writes | Program::Busy => Bytes::mib(128),
            },
            hugepages: false,
            qemu: QemuBinary::find(None).await?,
            kernel,
            _one: one,
        })
    }

    /// A second QEMU, unpacked below the folder that `MIGRATOR_QEMU10_DIR` names, if it is set.
    pub async fn other_qemu(&self) -> anyhow::Result<Option<QemuBinary>> {
        let Some(root) = std::env::var_os("MIGRATOR_QEMU10_DIR") else {
            return Ok(None);
        };
        let root = PathBuf::from(root);
        let config = QemuConfig {
            binary: Some(root.join("usr/bin/qemu-system-x86_64")),
            lib_dir: Some(root.join("usr/lib/x86_64-linux-gnu")),
            data_dirs: vec![root.join("usr/share/qemu"), root.join("usr/share/seabios")],
        };
        Ok(Some(QemuBinary::open(&config).await?))
    }

    pub fn spec(&self) -> VmSpec {
        VmSpec {
            name: "test".to_owned(),
            uuid: "8a5e2f0c-0000-4000-8000-000000000001".to_owned(),
            machine: MACHINE.to_owned(),
            cpu: CPU.to_owned(),
            accel: Accel::Tcg,
            memory: self.memory,
            vcpus: 2,
            mac: "52:54:00:00:00:02".parse().unwrap(),
            disks: vec![DiskSpec {
                serial: "img0".to_owned(),
                image_digest: String::new(),
                size: Bytes::mib(1),
            }],
            writable: Vec::new(),
            free_page_reporting: !self.hugepages,
            announced_images: false,
            hugepages: self.hugepages,
            cmdline: format!("{KERNEL_CMDLINE} quiet"),
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
        }
    }

    pub fn resources(&self, name: &str, qemu: &QemuBinary) -> anyhow::Result<VmResources> {
        let dir = self.dir.path().join(name);
        std::fs::create_dir(&dir)?;
        let disk = dir.join(DISK);
        File::create(&disk)?.set_len(Bytes::mib(1).0)?;
        Ok(VmResources {
            dir,
            memory: Arc::new(match self.hugepages {
                false => GuestMemory::create("test", self.memory)?,
                true => GuestMemory::create_huge("test", self.memory)?,
            }),
            tap: tap("tap0")?,
            park: Some(tap("park0")?),
            qemu: qemu.clone(),
            kernel: self.kernel.clone(),
            initramfs: self.dir.path().join("initramfs"),
            disks: vec![disk],
            rbd: Vec::new(),
        })
    }

    /// What a QEMU gets that replaces the one of the VM `vm`.
    pub fn successor(&self, qemu: &QemuBinary) -> anyhow::Result<SuccessorResources> {
        Ok(SuccessorResources {
            qemu: qemu.clone(),
            kernel: self.kernel.clone(),
            initramfs: self.dir.path().join("initramfs"),
            disks: vec![self.dir.path().join("vm").join(DISK)],
            spare_tap: tap("spare0")?,
        })
    }

    /// The folder with the console of the VM `vm`.
    pub fn console(&self) -> &Path {
        self.console.as_path()
    }

    /// A VM whose guest counts already.
    pub async fn booted(&self, name: &str) -> anyhow::Result<Vm> {
        let vm = Vm::boot(&self.spec(), self.resources(name, &self.qemu)?).await?;
        counts_past(vm.dir(), 20).await?;
        Ok(vm)
    }
}

impl Drop for Lab {
    /// A test that failed leaves its VMs running: they are made to outlive whoever started them.
    fn drop(&mut self) {
        let dirs = std::fs::read_dir(self.dir.path()).into_iter().flatten();
        let dirs: Vec<PathBuf> = dirs
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_dir())
            .collect();
        let kill = move || -> anyhow::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            for dir in dirs {
                runtime.block_on(VmRecord::kill_others(&dir))?;
                if let Ok(record) = VmRecord::load(&dir) {
                    runtime.block_on(record.kill())?;
                }
            }
            Ok(())
        };
        match std::thread::spawn(kill).join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => eprintln!("a VM of this test was not killed: {error:#}"),
            Err(_) => eprintln!("a VM of this test was not killed"),
        }
    }
}

/// The last number that the guest has printed.
pub fn count(dir: &Path) -> Option<u64> {
    let text = std::fs::read(dir.join(CONSOLE)).ok()?;
    let text = String::from_utf8_lossy(&text);
    let (whole, _cut) = text.rsplit_once('\n')?;
    whole
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
}

/// Waits until the guest's count is past `floor`.
pub async fn counts_past(dir: &Path, floor: u64) -> anyhow::Result<u64> {
    let watched = dir.to_owned();
    let reached = tokio::task::spawn_blocking(move || {
        let mut past = None;
        poll_until(BOOT_LIMIT, || {
            past = count(&watched).filter(|count| *count > floor);
            past.is_some()
        });
        past
    });
    match reached.await? {
        Some(count) => Ok(count),
        None => bail!(
            "the guest does not count past {floor}: {}",
            String::from_utf8_lossy(&std::fs::read(dir.join(CONSOLE))?)
        ),
    }
}

/// Makes `to` equal to `from`, as the migration does: what is a hole there becomes one here.
pub fn copy(from: &GuestMemory, to: &GuestMemory) -> anyhow::Result<u64> {
    for range in to.data_ranges()? {
        to.punch(range)?;
    }
    let mut copied = 0;
    let mut page = [0; PAGE_SIZE];
    for range in from.data_ranges()? {
        for index in range.start.0..range.end.0 {
            from.read(PageIndex(index), &mut page)?;
            if !is_zero(&page) {
                to.write(PageIndex(index), &page)?;
                copied += 1;
            }
        }
    }
    Ok(copied)
}

/// The hash of every page.
pub fn hashes(memory: &GuestMemory) -> anyhow::Result<Vec<u64>> {
    let mut page = [0; PAGE_SIZE];
    (0..memory.pages())
        .map(|index| {
            memory.read(PageIndex(index), &mut page)?;
            Ok(page_hash(&page))
        })
        .collect()
}

/// A TAP in a network namespace of its own, which lives as long as the descriptor.
fn tap(name: &'static str) -> anyhow::Result<OwnedFd> {
    let made = std::thread::spawn(move || -> anyhow::Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET).context("these tests need root")?;
        let tun = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        set_interface(&tun, name)?;
        Ok(tun.into())
    });
    made.join().expect("the thread does not panic")
}

nix::ioctl_write_int!(tun_set_iff, b'T', 202);

fn set_interface(tun: &File, name: &str) -> anyhow::Result<()> {
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF takes the address of an ifreq, which lives through the call.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw mut request as u64) }?;
    Ok(())
}
