//! Attaching the programs of the fast way, or saying why not.

use std::io;
use std::path::Path;

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, RawTracePoint, Xdp, XdpMode};
use migrator_ebpf::{MAX_SLOTS, QUEUES_MAX, names};

use super::{FastWay, Open, UplinkPath, XdpChoice};
use crate::network::gate::{Cause, lock};
use crate::network::netlink::Link;

/// Pin of the uplink's link, before its interface index.
const UPLINK_PIN: &str = "link_uplink_";
/// Pin of the tracepoint's link.
const TAP_FULL_PIN: &str = "link_tap_full";

impl FastWay {
    /// Opens the way if it can be had, and closes it otherwise.
    pub(crate) fn start(
        &self,
        programs: &mut Ebpf,
        choice: XdpChoice,
        name: &str,
        uplink: Link,
        bridge: Option<Link>,
    ) -> UplinkPath {
        let result = obstacle(choice, name, uplink, bridge)
            .map_or(Ok(()), Err)
            .and_then(|()| self.attach(programs, name, uplink));
        let Err(why) = result else {
            tracing::info!(
                uplink = name,
                "small packets for pods take the fast way (native XDP)"
            );
            return UplinkPath::Xdp;
        };
        self.stop();
        tracing::info!(uplink = name, why, "packets for pods take the kernel's way");
        match bridge {
            Some(_) => UplinkPath::Bridge { why },
            None => UplinkPath::Routes { why },
        }
    }

    fn attach(&self, programs: &mut Ebpf, name: &str, uplink: Link) -> Result<(), String> {
        self.loaded.clone()?;
        let index = uplink.index;
        let mut of_entries = |program| {
            xdp(programs, program)
                .and_then(|program| Ok(program.fd()?.try_clone()?))
                .map_err(refused("the programs of redirected frames"))
        };
        let (into_tap, onto_wire) = (of_entries(names::INTO_TAP)?, of_entries(names::ONTO_WIRE)?);
        self.watch_losses(programs)
            .map_err(refused("the program that counts losses"))?;
        let program = xdp(programs, names::UPLINK).map_err(refused("the uplink's program"))?;
        let pin = self.dir.join(format!("{UPLINK_PIN}{index}"));
        self.remove_uplinks(Some(index));
        if adopt(program, &pin).is_err() {
            // What it has counted is from another time.
            let _ = std::fs::remove_file(&pin);
            self.forget_all();
            fresh(program, index, &pin).map_err(|error| explain(name, error))?;
        }
        // Set once: a service opens its network once.
        let _ = self.open.set(Open {
            into_tap,
            onto_wire,
            uplink: index,
            no_way_on: (uplink.rx_queues > QUEUES_MAX).then(|| {
                format!(
                    "{name} has more receive queues than the {QUEUES_MAX} whose frames can be told in order"
                )
            }),
        });
        Ok(())
    }

    /// The kernel has no update for a tracepoint's link: two of them for a moment book nothing twice, since the first one takes the note away.
    fn watch_losses(&self, programs: &mut Ebpf) -> Result<(), Cause> {
        let program = tracepoint(programs)?;
        let id = program.attach(names::DEVMAP_XMIT)?;
        let link: FdLink = program.take_link(id)?.into();
        let pin = self.dir.join(TAP_FULL_PIN);
        let new = self.dir.join("link_tap_full_new");
        let _ = std::fs::remove_file(&new);
        drop(link.pin(&new)?);
        std::fs::rename(new, pin)?;
        Ok(())
    }

    /// Takes the programs away; pods are forgotten.
    fn stop(&self) {
        self.remove_uplinks(None);
        let _ = std::fs::remove_file(self.dir.join(TAP_FULL_PIN));
        self.forget_all();
        for slot in 0..MAX_SLOTS as u16 {
            if let Err(error) = self.forget_outer(slot) {
                tracing::warn!(%error, slot, "late frames may be relayed for longer than they need");
            }
        }
    }

    fn forget_all(&self) {
        let slots: Vec<u16> = lock(&self.locals)
            .iter()
            .flatten()
            .map(|(_, local)| local.slot)
            .collect();
        for slot in slots {
            if let Err(error) = self.forget(slot) {
                tracing::warn!(%error, slot, "a pod may still be known to the uplink's program");
            }
        }
    }

    /// Takes the program off every uplink but this one.
    fn remove_uplinks(&self, but: Option<u32>) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let index = name.to_str().and_then(|name| name.strip_prefix(UPLINK_PIN));
            if let Some(index) = index
                && index.parse().ok() != but
            {
                // A pin that cannot be removed keeps a program that knows no pods.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Loads the programs. Only before the maps are taken out of the object: until then it keeps the descriptors that they name.
pub(super) fn load(programs: &mut Ebpf) -> Result<(), String> {
    let load = |programs: &mut Ebpf| -> Result<(), Cause> {
        xdp(programs, names::INTO_TAP)?.load()?;
        xdp(programs, names::ONTO_WIRE)?.load()?;
        xdp(programs, names::UPLINK)?.load()?;
        Ok(tracepoint(programs)?.load()?)
    };
    load(programs).map_err(refused("the programs of the fast way"))
}

fn refused(what: &'static str) -> impl FnOnce(Cause) -> String {
    move |error| format!("the kernel does not take {what}: {}", chain(error.as_ref()))
}

fn xdp<'a>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, Cause> {
    let program = programs.program_mut(name);
    Ok(program.ok_or("it is not in the object")?.try_into()?)
}

fn tracepoint(programs: &mut Ebpf) -> Result<&mut RawTracePoint, Cause> {
    let program = programs.program_mut(names::TAP_FULL);
    Ok(program.ok_or("it is not in the object")?.try_into()?)
}

/// Replaces the program of a pinned link. The link may be dead: its device was removed.
fn adopt(program: &mut Xdp, pin: &Path) -> Result<(), Cause> {
    let link: XdpLink = FdLink::from(PinnedLink::from_pin(pin)?).try_into()?;
    let id = program.attach_to_link(link)?;
    // The pin keeps the link; this process need not.
    drop(program.take_link(id)?);
    Ok(())
}

fn fresh(program: &mut Xdp, index: u32, pin: &Path) -> Result<(), Cause> {
    let id = program.attach_to_if_index(index, XdpMode::Driver)?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    drop(link.pin(pin)?);
    Ok(())
}

/// What speaks against the fast way before it is tried.
fn obstacle(choice: XdpChoice, name: &str, uplink: Link, bridge: Option<Link>) -> Option<String> {
    if choice == XdpChoice::Off {
        return Some("the configuration says `xdp: off`".to_owned());
    }
    if choice == XdpChoice::Auto && uplink.is_veth {
        return Some(format!(
            "{name} is a veth: XDP would turn the segmentation offload of its other end off, which costs TCP more than small packets gain; `xdp: on` uses it all the same"
        ));
    }
    let Some(bridge) = bridge else {
        return Some("pods are routed, and the fast way is for those on a bridge".to_owned());
    };
    if bridge.vlan_filtering {
        return Some("the bridge filters VLANs, which the fast way would go past".to_owned());
    }
    if steers_packets(name, uplink.index) {
        return Some(format!(
            "{name} hands packets to other CPUs (RPS), which mixes the two ways' order: write 0 to /sys/class/net/{name}/queues/rx-*/rps_cpus"
        ));
    }
    None
}

/// Whether receive packet steering is on. `/sys` may show another network namespace: then nothing is known, and it is off by default.
fn steers_packets(name: &str, index: u32) -> bool {
    let device = Path::new("/sys/class/net").join(name);
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    if read(&device.join("ifindex")).trim().parse() != Ok(index) {
        return false;
    }
    let queues = std::fs::read_dir(device.join("queues"));
    queues.into_iter().flatten().flatten().any(|queue| {
        read(&queue.path().join("rps_cpus"))
            .chars()
            .any(|c| c.is_ascii_hexdigit() && c != '0')
    })
}

/// What the kernel's refusal of a native XDP program means (`dev_xdp_attach` in net/core/dev.c, and the drivers' `ndo_bpf`).
fn explain(name: &str, error: Cause) -> String {
    let errno = error
        .downcast_ref::<ProgramError>()
        .and_then(|error| match error {
            ProgramError::SyscallError(call) => call.io_error.raw_os_error(),
            _ => None,
        });
    match errno {
        Some(libc::EOPNOTSUPP) => format!("the driver of {name} has no native XDP"),
        Some(libc::ERANGE) => format!(
            "the MTU of {name}, or of its peer, is too large for XDP: about 3500 bytes are what fits a page"
        ),
        Some(libc::ENOSPC) => {
            format!("{name} has fewer receive queues than its peer sends by")
        }
        Some(libc::EBUSY) => format!("another XDP program is attached to {name}"),
        Some(libc::ENOTCONN) => format!("{name} has no peer"),
        Some(errno) => format!(
            "{name} takes no native XDP program: {}",
            io::Error::from_raw_os_error(errno)
        ),
        None => format!(
            "{name} takes no native XDP program: {}",
            chain(error.as_ref())
        ),
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_runtime::units::MacAddress;

    const LINK: Link = Link {
        index: 7,
        mac: MacAddress([0; 6]),
        mtu: 1500,
        tx_dropped: 0,
        rx_queues: 1,
        vlan_filtering: false,
        is_veth: false,
        other_drops: 0,
        queue: 0,
        up: true,
    };

    #[test]
    fn a_choice_a_veth_routed_pods_and_a_filtering_bridge_keep_the_way_closed() {
        let why = |choice, bridge| obstacle(choice, "none0", LINK, Some(bridge));
        let veth = Link {
            is_veth: true,
            ..LINK
        };
        let said = obstacle(XdpChoice::Auto, "none0", veth, Some(LINK));
        assert!(said.is_some_and(|why| why.contains("veth")));
        assert_eq!(obstacle(XdpChoice::On, "none0", veth, Some(LINK)), None);
        assert_eq!(why(XdpChoice::Auto, LINK), None);
        let routed = obstacle(XdpChoice::Auto, "none0", LINK, None);
        assert!(routed.is_some_and(|why| why.contains("routed")));
        assert!(why(XdpChoice::Off, LINK).is_some_and(|why| why.contains("xdp: off")));
        let filtering = Link {
            vlan_filtering: true,
            ..LINK
        };
        assert!(why(XdpChoice::Auto, filtering).is_some_and(|why| why.contains("VLAN")));
    }
}
