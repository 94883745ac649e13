//! Large pages of the kernel these tests run on, for as long as a test needs them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use vm_runtime::memory::{HUGE_PAGE, huge_pages_available};
use vm_runtime::units::Bytes;

/// How many huge pages the kernel reserves.
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Whether memory files get transparent huge pages.
const SHMEM: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// A setting of the kernel, which is as before once this is dropped.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// Huge pages: that many are available, no more and no less.
    ///
    /// # Errors
    /// The kernel has not enough memory in one piece.
    pub fn huge_pages(wanted: Bytes) -> Result<Self> {
        let pages = |bytes: Bytes| bytes.0.div_ceil(HUGE_PAGE);
        let now: u64 = read(Path::new(POOL))?.trim().parse()?;
        let used = now.saturating_sub(pages(huge_pages_available()));
        let setting = Self::set(POOL, &(used + pages(wanted)).to_string())?;
        let got = huge_pages_available();
        ensure!(
            pages(got) == pages(wanted),
            "the kernel gives {got} of the {wanted} of huge pages that this test needs: the host's memory is full, or in pieces"
        );
        Ok(setting)
    }

    /// Transparent huge pages for memory files: `advise` (where a process asks for them) or `always`.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn shmem(value: &str) -> Result<Self> {
        Self::set(SHMEM, value)
    }

    fn set(path: &str, value: &str) -> Result<Self> {
        let path = PathBuf::from(path);
        let text = read(&path)?;
        // A choice of several shows the one in use in brackets.
        let chosen = text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        let before = chosen.map_or(text.trim(), |(chosen, _)| chosen).to_owned();
        std::fs::write(&path, value).with_context(|| format!("cannot set {}", path.display()))?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, &self.before) {
            eprintln!("{} stays changed: {error}", self.path.display());
        }
    }
}

/// The largest figure, in KiB, that a process's memory map has under this name, proc_pid_smaps(5).
///
/// # Errors
/// The process is gone.
pub fn largest_kib(pid: i32, name: &str) -> Result<u64> {
    let smaps = read(&Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    let figures = smaps.lines().filter_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key == name).then(|| value.trim().strip_suffix(" kB")?.parse().ok())?
    });
    figures
        .max()
        .with_context(|| format!("process {pid} has no {name}"))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
