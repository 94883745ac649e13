//! Unsafe island: the calls that put a thread in front of others.

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

/// Has the calling thread run before ordinary tasks, and longer, but not without end: a nice value of -10. For threads that others can keep busy.
///
/// # Errors
/// This process may not (`CAP_SYS_NICE`, setpriority(2)); the thread stays as it is.
pub fn favour_this_thread() -> io::Result<()> {
    // SAFETY: setpriority(2) takes no pointers; 0 names the calling thread on Linux, so no other thread is touched.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -10) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
