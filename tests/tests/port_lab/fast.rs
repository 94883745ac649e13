//! The fast way on real devices: native XDP on a veth, straight into the TAP.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::ensure;
use aya::maps::{Array, Map, MapData};
use migrator::network::{
    ExistingDevices, NodeNetwork, Port, Role, Stage, UplinkPath, VNET_HEADER, XdpChoice,
};
use migrator_ebpf::{ABI, bucket_index, names};
use migrator_tests::jobs::Jobs;
use migrator_tests::netns::{BpfDir, Netns, require_root};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;

use super::{
    CLIENT_MAC, DEADLINE, GROUP_FLOW, Guest, Inbox, Lab, POD_MAC, Setup, check_ledger, config,
    finish_ipv4, pod, say_hello,
};

fn fast(lab: &Lab, port: &Port) -> anyhow::Result<u64> {
    Ok(lab.a.ledger(port)?.reasons.fast)
}

/// Waits until more than `before` frames have taken the fast way.
fn wait_for_fast(lab: &Lab, port: &Port, before: u64) -> anyhow::Result<()> {
    let until = Instant::now() + DEADLINE;
    while fast(lab, port)? <= before {
        ensure!(Instant::now() < until, "nothing takes the fast way");
        std::thread::yield_now();
    }
    Ok(())
}

#[test]
fn a_gate_that_holds_and_opens_again_and_again_keeps_every_flow_in_order() -> anyhow::Result<()> {
    const FLIPS: u64 = 40;
    const FRAMES: u64 = 1_000;
    let lab = Lab::new()?;
    ensure!(*lab.a.network.uplink() == UplinkPath::Xdp);
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    let sender = lab.sender((FLIPS + 2) * FRAMES)?;
    for flip in 1..=FLIPS {
        wait_for_fast(&lab, &at_a, fast(&lab, &at_a)?)?;
        let port = at_a.clone();
        lab.a
            .call(async move { port.hold(mpsc::unbounded_channel().0).await })??;
        let held = fast(&lab, &at_a)?;
        sender.wait_for(flip * FRAMES)?;
        ensure!(fast(&lab, &at_a)? == held, "the fast way goes past a hold");
        let port = at_a.clone();
        lab.a.call(async move {
            port.rollback().await?;
            port.reached(Stage::Local).await
        })??;
    }
    let sent = sender.finish();
    inbox.check(&sent)?;
    let ledger = lab.a.settled_ledger(&at_a)?;
    check_ledger(&ledger)?;
    ensure!(ledger.reasons.parked > 0, "{ledger:?}");
    guest.stop();
    Ok(())
}

#[test]
fn the_fast_way_works_while_no_service_runs_and_under_the_next_one() -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let (tap, park) = (at_a.tap_fd()?, at_a.park_fd()?);
    let guest = Guest::start(tap.try_clone()?, &inbox);
    say_hello(&at_a)?;
    let sender = lab.sender(30_000)?;
    wait_for_fast(&lab, &at_a, 0)?;
    let before = lab.a.ledger(&at_a)?.reasons;
    drop(at_a);
    sender.wait_for(15_000)?;
    lab.a.restart()?;
    let existing = ExistingDevices { tap, park };
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, Some(existing))?;
    let after = lab.a.ledger(&at_a)?.reasons;
    ensure!(after.fast > before.fast + 5_000, "{before:?} {after:?}");
    wait_for_fast(&lab, &at_a, after.fast)?;
    let sent = sender.finish();
    inbox.check(&sent)?;
    check_ledger(&lab.a.settled_ledger(&at_a)?)?;
    guest.stop();
    Ok(())
}

#[test]
fn what_a_full_tap_drops_is_booked_frame_by_frame() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    lab.a.netns.ip("link set mt1 txqueuelen 500")?;
    say_hello(&at_a)?;
    let sent: BTreeMap<u8, u64> = lab.sender(5_000)?.finish();
    let total: u64 = sent.values().sum();
    let unicast = total - sent.get(&GROUP_FLOW).copied().unwrap_or_default();
    let until = Instant::now() + DEADLINE;
    let ledger = loop {
        let ledger = lab.a.ledger(&at_a)?;
        if ledger.reasons.fast == unicast && ledger.reasons.passed >= total - unicast {
            break ledger;
        }
        ensure!(Instant::now() < until, "{ledger:?}");
    };
    ensure!(ledger.balances() && ledger.lost > 0, "{ledger:?}");
    let tap = at_a.tap_fd()?;
    let mut buffer = vec![0; 70_000];
    let mut read = 0;
    while nix::unistd::read(tap.as_fd(), &mut buffer).is_ok() {
        read += 1;
    }
    ensure!(read == ledger.delivered, "{read} were there, {ledger:?}");
    Ok(())
}

/// A UDP datagram that its sender leaves to the device to finish.
fn unfinished() -> Vec<u8> {
    // struct virtio_net_hdr: NEEDS_CSUM, no segments, checksum start and offset.
    let mut frame = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0];
    frame.extend(POD_MAC.0);
    frame.extend(CLIENT_MAC.0);
    frame.extend([0x08, 0x00, 0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 77, 1, 1, 10, 77, 0, 10]);
    frame.extend([0x13, 0x88, 0, 7, 0, 40]);
    let pseudo = (10 << 8) + 77 + (1 << 8) + 1 + (10 << 8) + 77 + 10 + 17 + 40;
    frame.extend(u16::try_from(pseudo).expect("no carry").to_be_bytes());
    frame.extend((0..32).map(|i| i * 5));
    finish_ipv4(&mut frame);
    frame
}

#[test]
fn a_checksum_that_was_left_to_the_device_is_right_when_it_comes() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    say_hello(&at_a)?;
    nix::unistd::write(lab.client_tap.as_fd(), &unfinished())?;
    let tap = at_a.tap_fd()?;
    let mut buffer = vec![0; 2_000];
    let frame = loop {
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        ensure!(poll(&mut fds, PollTimeout::from(5_000u16))? > 0, "no frame");
        let len = nix::unistd::read(tap.as_fd(), &mut buffer)?;
        if buffer[VNET_HEADER + 6..VNET_HEADER + 12] == CLIENT_MAC.0 {
            break &buffer[VNET_HEADER..len];
        }
    };
    ensure!(fast(&lab, &at_a)? == 1, "it took the other way");
    let words = frame[26..].chunks(2);
    let sum = words.map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum = migrator_ebpf::fold(sum.sum::<u64>() + 17 + 40);
    ensure!(sum == 0xffff, "{frame:02x?}");
    Ok(())
}

/// A service in a namespace whose uplink was made by `links`.
fn path(links: &[&str], choice: XdpChoice) -> anyhow::Result<UplinkPath> {
    require_root();
    let netns = Netns::new()?;
    netns.ip("link add br0 type bridge forward_delay 0")?;
    for link in links {
        netns.ip(link)?;
    }
    let jobs = Jobs::start(&netns);
    let (dir, spool) = (BpfDir::new()?, tempfile::tempdir()?);
    let setup = Setup {
        xdp: choice,
        ..Setup::default()
    };
    let network = jobs.call(NodeNetwork::open(config(&dir, &spool, setup)))??;
    Ok(network.uplink().clone())
}

#[test]
fn an_uplink_that_takes_no_native_xdp_leaves_all_to_the_bridge_and_says_why() -> anyhow::Result<()>
{
    const VETH: &str = "link add eth0 type veth peer name p1";
    let why = |links: &[&str], choice| -> anyhow::Result<String> {
        match path(links, choice)? {
            UplinkPath::Xdp => Ok(String::new()),
            UplinkPath::Bridge { why } | UplinkPath::Routes { why } => Ok(why),
        }
    };
    let said = why(&["link add eth0 type ifb"], XdpChoice::Auto)?;
    ensure!(said.contains("no native XDP"), "{said}");
    let jumbo = [VETH, "link set p1 mtu 9000", "link set eth0 mtu 9000"];
    let said = why(&jumbo, XdpChoice::On)?;
    ensure!(said.contains("MTU"), "{said}");
    let said = why(&[VETH], XdpChoice::Auto)?;
    ensure!(said.contains("veth"), "{said}");
    let said = why(&[VETH], XdpChoice::Off)?;
    ensure!(said.contains("xdp: off"), "{said}");
    ensure!(path(&[VETH], XdpChoice::On)? == UplinkPath::Xdp);
    Ok(())
}

/// The sum of a pinned map's counters for slot 1.
fn counted(lab: &Lab, name: &str) -> anyhow::Result<u64> {
    let pin = lab.a.dir.path().join(format!("v{ABI}")).join(name);
    let map = Map::from_map_data(MapData::from_pin(pin)?)?;
    let map: Array<MapData, u64> = map.try_into()?;
    let mut sum = 0;
    for bucket in 0..=u8::MAX {
        sum += map.get(&bucket_index(1, bucket), 0)?;
    }
    Ok(sum)
}

#[test]
fn a_bucket_that_lost_a_frame_takes_the_fast_way_again_after_a_pause() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    say_hello(&at_a)?;
    // Frames that are held go by the bridge, whose port is shut: they never come to the gate.
    let port = at_a.clone();
    lab.a
        .call(async move { port.hold(mpsc::unbounded_channel().0).await })??;
    lab.a.netns.run("bridge", "link set dev mt1 state 0")?;
    lab.sender(150)?.finish();
    lab.a.netns.run("bridge", "link set dev mt1 state 3")?;
    let port = at_a.clone();
    lab.a.call(async move {
        port.rollback().await?;
        port.reached(Stage::Local).await
    })??;
    let until = Instant::now() + DEADLINE;
    ensure!(counted(&lab, names::PASSED)? > 0, "nothing was lost");
    while counted(&lab, names::ARRIVED)? != counted(&lab, names::PASSED)? {
        ensure!(Instant::now() < until, "the service does not look");
        std::thread::yield_now();
    }
    let before = fast(&lab, &at_a)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    let sent = lab.sender(15)?.finish();
    wait_for_fast(&lab, &at_a, before + sent.values().sum::<u64>() - 1)?;
    guest.stop();
    Ok(())
}
