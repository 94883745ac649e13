//! Unsafe island: the one call that puts a thread in front of others.

use std::io;

/// Puts the calling thread in front of all ordinary tasks: SCHED_FIFO, at the lowest real-time priority. For threads that
/// work briefly and then wait.
///
/// # Errors
/// This process may not (`CAP_SYS_NICE`, sched(7)); the thread stays as it is.
pub fn prefer_this_thread() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: sched_setscheduler(2) reads one sched_param through the pointer, which lives across the call; pid 0 names
    // the calling thread, so no other thread's scheduling is touched.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
