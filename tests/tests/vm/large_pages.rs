//! Guests whose memory is made of large pages: the kernel's own (THP), and reserved ones (hugetlbfs).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use migrator::memory::track::{Holes, Tracking};
use migrator_tests::large_pages::{Setting, largest_kib};
use nix::unistd::pipe;
use vm_runtime::memory::{GuestMemory, HUGE_PAGE, PageReader, huge_pages_available, is_zero};
use vm_runtime::units::{Bytes, PAGE_SIZE, PageIndex, PageRange};
use vm_runtime::vm::Vm;

use crate::lab::{Lab, count, counts_past, hashes};
use crate::link::Link;
use crate::moved;

/// Pages of 4 KiB in a huge one.
const SMALL: u64 = HUGE_PAGE / PAGE_SIZE as u64;

/// Copies a running guest's memory with the engine, stops the guest, and compares.
async fn crosses(vm: &Vm, destination: GuestMemory) -> Result<()> {
    let memory = vm.memory();
    let tracking = Tracking::new(memory.pages(), Holes::Counted);
    tracking.start(vm)?;
    let mut link = Link::new(&memory, destination)?;
    link.round(&tracking).await?;
    for _ in 0..3 {
        let floor = count(vm.dir()).context("it counts")? + 2;
        counts_past(vm.dir(), floor).await?;
        let (written, _) = tracking.scan()?;
        ensure!(written > 0, "a guest that counts writes");
        link.round(&tracking).await?;
    }
    vm.stop().await?;
    tracking.scan()?;
    link.round(&tracking).await?;
    let (written, pending) = tracking.scan()?;
    ensure!((written, pending) == (0, 0), "a stopped guest writes");
    tracking.stop();
    let (ours, theirs) = (hashes(&memory)?, hashes(&link.destination)?);
    let differ = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
    ensure!(differ == 0, "{differ} pages differ");
    vm.cont().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_of_reserved_huge_pages_is_tracked_copied_and_moved() -> Result<()> {
    let mut lab = Lab::new().await?;
    lab.hugepages = true;
    let size = lab.spec().memory;
    let _pool = Setting::huge_pages(Bytes(3 * size.0))?;
    let vm = lab.booted("vm").await?;
    ensure!(vm.memory().is_huge(), "its memory is not of huge pages");
    ensure!(
        largest_kib(vm.pid(), "KernelPageSize")? * 1024 == HUGE_PAGE,
        "QEMU maps it in small pages"
    );
    crosses(&vm, GuestMemory::create_huge("destination", size)?).await?;
    // From huge pages to huge pages, device state and all, and found again by a restarted service.
    let record = vm.record();
    drop(vm);
    let vm = Vm::attach(&record).await?;
    ensure!(vm.memory().is_huge(), "it is not known again");
    let second = moved(&lab, &vm, "second", &lab.qemu).await?;
    vm.kill().await?;
    second.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_of_transparent_huge_pages_is_tracked_copied_and_moved() -> Result<()> {
    let _advise = Setting::shmem("advise")?;
    let lab = Lab::new().await?;
    let vm = lab.booted("vm").await?;
    ensure!(
        largest_kib(vm.pid(), "ShmemPmdMapped")? > 0,
        "QEMU maps no huge page"
    );
    crosses(&vm, GuestMemory::create("destination", lab.spec().memory)?).await?;
    let second = moved(&lab, &vm, "second", &lab.qemu).await?;
    vm.kill().await?;
    second.kill().await?;
    Ok(())
}

#[test]
fn huge_pages_are_written_read_and_given_back_as_small_ones_are() -> Result<()> {
    let size = Bytes(4 * HUGE_PAGE);
    let _pool = Setting::huge_pages(size)?;
    let memory = Arc::new(GuestMemory::create_huge("huge-test", size)?);
    ensure!(huge_pages_available() == Bytes(0), "they are not reserved");
    let refused = GuestMemory::create_huge("huge-test", Bytes(HUGE_PAGE)).err();
    let refused = refused.context("there was one more")?.to_string();
    ensure!(refused.contains("vm.nr_hugepages"), "{refused}");

    // Across the border of two huge pages.
    memory.write(PageIndex(SMALL - 1), &[7; 2 * PAGE_SIZE])?;
    memory.write(PageIndex(3 * SMALL), &[8; PAGE_SIZE])?;
    ensure!(
        memory.allocated_pages()? == 3 * SMALL,
        "not three huge pages"
    );
    let reader = PageReader::new(&memory);
    let mut page = [0; PAGE_SIZE];
    for (index, byte) in [
        (0, 0),
        (SMALL - 1, 7),
        (SMALL, 7),
        (SMALL + 1, 0),
        (2 * SMALL, 0),
        (3 * SMALL, 8),
    ] {
        let zero = reader.copy(PageIndex(index), &mut page)?;
        ensure!(
            (zero, page) == (byte == 0, [byte; PAGE_SIZE]),
            "page {index}"
        );
    }
    // Reading took none.
    ensure!(memory.allocated_pages()? == 3 * SMALL, "a hole was filled");

    // A small page of a huge one, and a huge one with small ones around it.
    memory.punch(PageRange::new(3 * SMALL, 3 * SMALL + 1))?;
    memory.punch(PageRange::new(SMALL - 1, 2 * SMALL + 1))?;
    for index in 0..memory.pages() {
        memory.read(PageIndex(index), &mut page)?;
        ensure!(is_zero(&page), "page {index}");
    }
    ensure!(
        memory.allocated_pages()? == 2 * SMALL,
        "the one in the middle is not given back"
    );
    // It is still ours: nobody else can have it, and it can be written again.
    ensure!(
        huge_pages_available() == Bytes(0),
        "it is not reserved any more"
    );
    memory.write(PageIndex(SMALL), &[9; PAGE_SIZE])?;
    memory.read(PageIndex(SMALL), &mut page)?;
    ensure!(page == [9; PAGE_SIZE], "it is not written");
    ensure!(
        memory
            .write(PageIndex(4 * SMALL - 1), &[1; 2 * PAGE_SIZE])
            .is_err(),
        "beyond the end"
    );
    Ok(())
}

/// Puts the first page itself into a pipe, not a copy of it.
fn first_page_into(memory: &GuestMemory, pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut from: libc::loff_t = 0;
    // SAFETY: splice(2) between two descriptors that live through the call; `from` is a live loff_t, and a pipe takes no offset.
    let got = unsafe {
        libc::splice(
            memory.as_fd().as_raw_fd(),
            &raw mut from,
            pipe.as_raw_fd(),
            std::ptr::null_mut(),
            PAGE_SIZE,
            0,
        )
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

#[test]
fn a_transparent_huge_page_becomes_a_hole_when_nobody_uses_it() -> Result<()> {
    let _always = Setting::shmem("always")?;
    let memory = GuestMemory::create("thp-test", Bytes(2 * HUGE_PAGE))?;
    memory.write(PageIndex(0), &vec![7; HUGE_PAGE as usize])?;
    ensure!(
        memory.allocated_pages()? == SMALL,
        "it is not of one huge page"
    );
    // A page in a pipe is one in use, and the others of its huge page with it.
    let (user, entry) = pipe()?;
    let one = first_page_into(&memory, entry.as_fd())?;
    ensure!(one == PAGE_SIZE, "{one} bytes are in the pipe");
    let stale = PageRange::new(5, 9);
    let kept = memory.make_hole(stale).err().context("it became a hole")?;
    ensure!(kept.kind() == io::ErrorKind::ResourceBusy, "{kept}");
    let whole = [PageRange::new(0, SMALL)];
    ensure!(memory.data_ranges()? == whole, "it is not kept");

    drop((user, entry));
    memory.make_hole(stale)?;
    let around = [PageRange::new(0, 5), PageRange::new(9, SMALL)];
    ensure!(
        memory.data_ranges()? == around,
        "{:?}",
        memory.data_ranges()
    );
    Ok(())
}
