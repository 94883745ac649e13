//! The one call that neither std nor nix has: a real-time priority for the probe's threads.
//!
//! The probe measures silence of a pod; its own threads must not be the ones that are silent.

/// Gives the calling thread SCHED_FIFO, else niceness -10; returns which it got. Refusal is no error: the
/// measurement is then an upper bound.
pub fn prefer_this_thread() -> &'static str {
    let parameters = libc::sched_param { sched_priority: 5 };
    // SAFETY: sched_setscheduler(2) reads one sched_param through the pointer, which lives across the call;
    // pid 0 names the calling thread, so no other thread's scheduling is touched.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } == 0 {
        return "real-time";
    }
    if vm_runtime::sched::favour_this_thread().is_ok() {
        return "niceness -10";
    }
    "ordinary"
}
