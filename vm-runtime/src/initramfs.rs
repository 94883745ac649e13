//! The guest's initramfs: the agent as `/init`, and the kernel modules it loads.
//!
//! A `newc` cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst), the same bytes
//! for the same input: no times, no owners, numbered inodes. It is not compressed: under TCG the
//! guest's own decompression costs more than QEMU's copying does.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// The modules a guest needs, by file name without `.ko`, in an order that loads (each after those it depends on).
///
/// Names and dependencies are those of Debian's linux-image-6.1-cloud-amd64; ext4, unix, inet, packet
/// and the serial console are built in there.
pub const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
    "libcrc32c",
    "erofs",
    "overlay",
];

/// The guest's kernel command line.
///
/// `panic=-1`: a guest that has failed reboots at once, which ends the VM (QEMU runs with `-no-reboot`).
/// `rcu_expedited` and `cryptomgr.notests` shorten the boot under TCG; nothing is taken from the
/// guest's defences.
pub const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init \
     rcupdate.rcu_expedited=1 cryptomgr.notests no_timer_check 8250.nr_uarts=1 net.ifnames=0";

/// Why an initramfs was not built.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A part could not be read.
    #[error(
        "cannot read {path} for the initramfs: build the agent and unpack the guest kernel first (`cargo xtask setup`)"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A part is too big for the archive's format.
    #[error("{path} is larger than 4 GiB: a cpio archive cannot hold it")]
    TooBig {
        /// The file.
        path: PathBuf,
    },
    /// The archive could not be written.
    #[error("cannot write the initramfs {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Finds the files of [`MODULES`] below `dir` (a package's `lib/modules`, or a flat folder), in order.
///
/// # Errors
/// [`InitramfsError::Read`] if the folder cannot be read or a module is not in it.
pub fn find_modules(dir: &Path) -> Result<Vec<PathBuf>, InitramfsError> {
    let mut found = vec![None; MODULES.len()];
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let read = |source| InitramfsError::Read {
            path: folder.clone(),
            source,
        };
        for entry in fs::read_dir(&folder).map_err(read)? {
            let entry = entry.map_err(read)?;
            let path = entry.path();
            if entry.file_type().map_err(read)?.is_dir() {
                folders.push(path);
            } else if let Some(index) = MODULES.iter().position(|m| {
                path.file_name()
                    .is_some_and(|f| f == format!("{m}.ko").as_str())
            }) {
                found[index] = Some(path);
            }
        }
    }
    let missing = |name: &str| InitramfsError::Read {
        path: dir.join(format!("{name}.ko")),
        source: io::ErrorKind::NotFound.into(),
    };
    found
        .into_iter()
        .zip(MODULES)
        .map(|(path, name)| path.ok_or_else(|| missing(name)))
        .collect()
}

/// Writes an initramfs with the static binary `agent` as `/init` and `modules` in this order. The file
/// appears whole or not at all.
///
/// # Errors
/// A part that cannot be read, or an archive that cannot be written; nothing is left behind then.
pub fn build(agent: &Path, modules: &[PathBuf], out: &Path) -> Result<(), InitramfsError> {
    let write = |source| InitramfsError::Write {
        path: out.to_owned(),
        source,
    };
    let dir = out.parent().filter(|d| !d.as_os_str().is_empty());
    let file = tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new("."))).map_err(write)?;
    let mut archive = Archive {
        out: BufWriter::new(file.as_file()),
        inode: 0,
        written: 0,
    };
    for dir in ["dev", "modules"] {
        archive
            .entry(dir, DIRECTORY | 0o755, (0, 0), &[])
            .map_err(write)?;
    }
    // The kernel opens it as the first process's standard descriptors, before devtmpfs is there.
    archive
        .entry("dev/console", CHARACTER | 0o600, (5, 1), &[])
        .map_err(write)?;
    archive
        .entry("init", REGULAR | 0o755, (0, 0), &read(agent)?)
        .map_err(write)?;
    for (index, path) in modules.iter().enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("modules/{index:02}-{name}");
        archive
            .entry(&name, REGULAR | 0o644, (0, 0), &read(path)?)
            .map_err(write)?;
    }
    archive.finish().map_err(write)?;
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644)).map_err(write)?;
    file.persist(out).map_err(|e| write(e.error))?;
    Ok(())
}

/// File types of st_mode (inode(7)).
const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;

fn read(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    let bytes = fs::read(path).map_err(|source| InitramfsError::Read {
        path: path.to_owned(),
        source,
    })?;
    match u32::try_from(bytes.len()) {
        Ok(_) => Ok(bytes),
        Err(_) => Err(InitramfsError::TooBig {
            path: path.to_owned(),
        }),
    }
}

struct Archive<W> {
    out: W,
    inode: u32,
    written: usize,
}

impl Archive<BufWriter<&File>> {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            if mode & DIRECTORY == DIRECTORY { 2 } else { 1 },
            0, // mtime
            data.len() as u32,
            0, // the archive's own device
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum, unused by newc
        ];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        self.bytes(header.as_bytes())?;
        self.bytes(name.as_bytes())?;
        self.bytes(&[0])?;
        self.align(4)?;
        self.bytes(data)?;
        self.align(4)
    }

    fn finish(mut self) -> io::Result<()> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.align(512)?;
        self.out.flush()
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn align(&mut self, to: usize) -> io::Result<()> {
        let padding = self.written.next_multiple_of(to) - self.written;
        self.bytes(&vec![0; padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(dir: &Path) -> Vec<u8> {
        let agent = dir.join("agent");
        let module = dir.join("erofs.ko");
        fs::write(&agent, b"\x7fELF agent").expect("written");
        fs::write(&module, b"module").expect("written");
        let out = dir.join("out.cpio");
        build(&agent, &[module], &out).expect("built");
        fs::read(out).expect("read")
    }

    #[test]
    fn the_same_parts_give_the_same_bytes() {
        let (a, b) = (
            tempfile::tempdir().expect("dir"),
            tempfile::tempdir().expect("dir"),
        );
        assert_eq!(sample(a.path()), sample(b.path()));
    }

    #[test]
    fn the_archive_holds_the_entries_in_order() {
        let dir = tempfile::tempdir().expect("dir");
        let bytes = sample(dir.path());
        assert_eq!(bytes.len() % 512, 0);
        let mut names = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let text = &bytes[at + 6 + n * 8..at + 14 + n * 8];
                usize::from_str_radix(std::str::from_utf8(text).expect("text"), 16).expect("hex")
            };
            let (size, name) = (field(6), field(11));
            let text = String::from_utf8_lossy(&bytes[at + 110..at + 109 + name]).into_owned();
            at = (at + 110 + name).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
            if text == "TRAILER!!!" {
                break;
            }
            names.push(text);
        }
        assert_eq!(
            names,
            [
                "dev",
                "modules",
                "dev/console",
                "init",
                "modules/00-erofs.ko"
            ]
        );
    }

    #[test]
    fn a_missing_module_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let error = find_modules(dir.path())
            .expect_err("nothing there")
            .to_string();
        assert!(error.contains("virtio_ring.ko"), "{error}");
    }
}
