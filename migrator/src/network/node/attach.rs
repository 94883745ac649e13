//! Puts a pod on the network of its node, or takes over one that a former service put there.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use migrator_ebpf::{Device, Gate, Local, MAX_SLOTS, Mode};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::{Notify, watch};
use tokio::time::{Duration, Instant};

use super::{ExistingDevices, NewDevices, NodeNetwork, PodNetId, Role, park_name, tap_name};
use crate::network::dataplane::{self, Setup, Stage};
use crate::network::error::AttachError;
use crate::network::gate::SlotGate;
use crate::network::ledger::Tally;
use crate::network::port::{Parts, Port};
use crate::network::sys::{self, PacketSocket};
use crate::network::uplink::STRAGGLERS;

impl NodeNetwork {
    /// Puts a pod on the network: its devices, its gate, and the thread that serves it. With
    /// `existing`, takes over what lives on; the gate stays as it is.
    ///
    /// # Errors
    /// See [`AttachError`]. New devices are gone again after an error.
    pub async fn attach(
        &self,
        pod: &PodNetId,
        slot: u16,
        role: Role,
        existing: Option<ExistingDevices>,
    ) -> Result<Port, AttachError> {
        check(slot)?;
        match existing {
            Some(devices) => self.try_attach(pod, slot, role, devices, true).await,
            None => {
                let devices = self.make_devices(slot)?;
                self.attach_new(pod, role, devices).await
            }
        }
    }

    /// Makes the devices of a pod that is to be attached in this slot, so that its VMM can be started meanwhile: nothing reaches them,
    /// and nothing may come from them, before [`attach_new`](Self::attach_new) is done.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn make_devices(&self, slot: u16) -> Result<NewDevices, AttachError> {
        check(slot)?;
        let devices = self.create(slot, &self.inner.gates.slot(slot))?;
        Ok(NewDevices { slot, devices })
    }

    /// As [`attach`](Self::attach), with devices that were made ahead.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub async fn attach_new(
        &self,
        pod: &PodNetId,
        role: Role,
        devices: NewDevices,
    ) -> Result<Port, AttachError> {
        let NewDevices { slot, devices } = devices;
        let result = self.try_attach(pod, slot, role, devices, false).await;
        if result.is_err() {
            // The error is what the caller needs to see; a leftover is cleared by the next attempt.
            let _ = self.inner.gates.detach(slot, None);
        }
        result
    }

    async fn try_attach(
        &self,
        pod: &PodNetId,
        slot: u16,
        role: Role,
        devices: ExistingDevices,
        adopted: bool,
    ) -> Result<Port, AttachError> {
        let gate = self.inner.gates.slot(slot);
        let name_of = |fd: &OwnedFd| {
            sys::tap_name(fd.as_fd()).map_err(|source| AttachError::Device {
                action: "ask the name of the device of",
                device: pod.name.clone(),
                source,
            })
        };
        let names = (name_of(&devices.tap)?, name_of(&devices.park)?);
        let netlink = &self.inner.netlink;
        let mtu = self.inner.mtu().await?;
        let park = netlink.raise_park(&names.1, mtu).await?;
        let tap = netlink.require(&names.0).await?;
        // A word that was never written: the devices live on, but the pins of the former service are out
        // of reach, as they are when it was in another mount namespace.
        if !adopted || gate.get().epoch == 0 {
            let (mode, may_send) = match role {
                Role::Local => (Mode::Local, true),
                Role::Incoming => (Mode::Shut, false),
            };
            gate.set(Gate {
                mode,
                may_send,
                slot,
                epoch: gate.get().epoch.wrapping_add(1),
            });
        }
        let fast = &self.inner.gates.fast;
        let local = Local {
            slot,
            // linux/if_ether.h ETH_HLEN.
            frame_max: u16::try_from(mtu + 14).unwrap_or(u16::MAX),
        };
        // The uplink's program counts first, the gate afterwards: no frame that the one has not counted may come to the other.
        let known = fast.introduce(pod.mac.0, local)?;
        let counted_from = Instant::now() + if known { Duration::ZERO } else { STRAGGLERS };
        if adopted {
            tokio::time::sleep_until(counted_from).await;
        } else {
            netlink.make_queueless(&names.0).await?;
        }
        let device = Device {
            park: park.index,
            out: 0,
            tunnel: self.inner.tunnel.device().unwrap_or(0),
            uplink: fast.uplink(),
            slot,
            mac: pod.mac.0,
        };
        // The gate first, so that nothing ever reaches a TAP without one.
        self.inner.gates.attach(&names.0, tap.index, device)?;
        let ground = &self.inner.config.ground;
        ground.raise_tap(netlink, &names.0, (pod.mac, mtu)).await?;
        fast.lead_to(slot, tap.index)?;
        let stage = initial_stage(gate.get().mode, role);
        if matches!(stage, Stage::Local | Stage::Holding | Stage::Forwarding) {
            tokio::time::sleep_until(counted_from).await;
            self.inner.own(&names.0, tap.index, pod).await?;
        }
        // One that has gone keeps the entry that it had: it may be the one of its next slot here.
        if matches!(stage, Stage::Local | Stage::Holding) {
            let inner = &self.inner;
            inner.tunnel.land(&inner.gates, pod.mac, slot, tap.index)?;
        }
        let tally = if adopted {
            let (counters, waiting) = gate.counters_and_waiting()?;
            Tally::after_restart(&counters, waiting, tap.tx_dropped)
        } else {
            Tally::default()
        };
        let port = self.start(
            pod,
            gate,
            names,
            (tap.index, counted_from),
            devices,
            (stage, tally),
        )?;
        if adopted {
            port.resync(true);
        }
        Ok(port)
    }

    fn create(&self, slot: u16, gate: &SlotGate) -> Result<ExistingDevices, AttachError> {
        self.inner.gates.detach(slot, None)?;
        gate.clear()?;
        self.inner.forget_packets(slot);
        let create = |name: String| {
            sys::create_tap(&name).map_err(|source| AttachError::Device {
                action: "create the TAP",
                device: name,
                source,
            })
        };
        let devices = ExistingDevices {
            tap: create(tap_name(slot))?,
            park: create(park_name(slot))?,
        };
        sys::set_park_offloads(devices.park.as_fd(), true).map_err(|source| {
            AttachError::Device {
                action: "set the offloads of",
                device: park_name(slot),
                source,
            }
        })?;
        Ok(devices)
    }

    fn start(
        &self,
        pod: &PodNetId,
        gate: SlotGate,
        names: (String, String),
        (tap_index, counted_from): (u32, Instant),
        devices: ExistingDevices,
        (stage, tally): (Stage, Tally),
    ) -> Result<Port, AttachError> {
        let device_error = |action| {
            let device = names.0.clone();
            move |source: std::io::Error| AttachError::Device {
                action,
                device,
                source,
            }
        };
        let injector =
            PacketSocket::injector(tap_index).map_err(device_error("open a packet socket on"))?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| device_error("make the wake-up for")(errno.into()))?;
        let wake = Arc::new(wake);
        let duplicate = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(device_error("duplicate the descriptor of"))
        };
        let (commands, receiver) = std::sync::mpsc::channel();
        let (acked, acked_watch) = watch::channel(0);
        let (stages, stage_watch) = watch::channel(stage);
        let echoed = Arc::new(Notify::new());
        let (full, full_watch) = watch::channel(false);
        let setup = Setup {
            pod: pod.name.clone(),
            tap_name: names.0.clone(),
            mac: pod.mac,
            gate: gate.clone(),
            spool: self.inner.spool(gate.slot()),
            landing: self.inner.landing(gate.slot()),
            tap: duplicate(&devices.tap)?,
            park: duplicate(&devices.park)?,
            injector,
            stage,
            tally,
            commands: receiver,
            wake: Arc::clone(&wake),
            acked,
            stages,
            echoed: Arc::clone(&echoed),
            full,
            share: self.inner.allowance.share(),
            routed: self.inner.endpoints.is_some(),
        };
        let thread = dataplane::start(setup).map_err(device_error("start the thread of"))?;
        Ok(Port::new(Parts {
            node: Arc::clone(&self.inner),
            pod: pod.clone(),
            gate,
            tap_name: names.0,
            park_name: names.1,
            tap_index,
            counted_from,
            devices,
            commands,
            wake,
            thread,
            acked: acked_watch,
            stages: stage_watch,
            echoed,
            full: full_watch,
        }))
    }
}

fn check(slot: u16) -> Result<(), AttachError> {
    match u32::from(slot) < MAX_SLOTS {
        true => Ok(()),
        false => Err(AttachError::BadSlot { slot }),
    }
}

/// Where the life of an adopted port goes on. A fresh one has the gate that fits its role.
fn initial_stage(mode: Mode, role: Role) -> Stage {
    match (mode, role) {
        (Mode::Local, _) => Stage::Local,
        (Mode::Shut, _) => Stage::Incoming,
        (Mode::Hold, Role::Local) => Stage::Holding,
        (Mode::Hold, Role::Incoming) => Stage::Opened,
        (Mode::Forward | Mode::Tunnel, _) => Stage::Forwarding,
    }
}
