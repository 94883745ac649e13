//! Frames of a departed pod that the uplink's program sends on itself.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::ensure;
use migrator::network::VNET_HEADER;
use migrator_ebpf::{
    Counter, Device, Direction, Ends, FrameBytes, Mode, OUTER_V4, OUTER_V6, Outer, Probe,
    TRACE_HEAD, TraceEvent, bucket, settle, source_port,
};
use migrator_tests::netns::{Netns, open_tap};
use migrator_tests::packet::PacketSocket;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bench::{Bench, LOOPBACK, PASS, REDIRECT, SLOT};
use crate::frames::{POD, UDP, fast_frames, frame, ipv4, other_frames, plain, udp};
use crate::gate_counts;

const HOP: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 0x98], [2, 0, 0, 0, 0, 0x97]];
const V4: Ends = Ends::V4([10, 78, 0, 1], [10, 78, 0, 2]);
/// fd78::1 and fd78::2.
const V6: Ends = Ends::V6(v6(1), v6(2));
const PORT: u16 = 4789;
const VNI: u32 = 0x4d;

const fn v6(last: u8) -> [u8; 16] {
    let mut address = [0; 16];
    (address[0], address[1], address[15]) = (0xfd, 0x78, last);
    address
}

fn outer(ends: Ends) -> Outer {
    Outer::new(LOOPBACK, 1514, HOP, ends, (VNI, PORT))
}

fn departed(ends: Ends) -> anyhow::Result<Bench> {
    let mut bench = Bench::new()?;
    bench.ways_out.insert(LOOPBACK, LOOPBACK, None, 0)?;
    bench.outers.insert(u32::from(SLOT), outer(ends), 0)?;
    bench.set(Mode::Tunnel)?;
    Ok(bench)
}

/// Sent on, and booked as that alone. What left.
#[track_caller]
fn is_sent_on(bench: &Bench, what: &str, frame: &[u8]) -> Vec<u8> {
    let books = || {
        let sent_on = bench.count(Counter::ForwardedXdp).unwrap();
        (sent_on, bench.fast().unwrap(), bench.passed(frame).unwrap())
    };
    let before = books();
    let (action, out) = bench.run(frame).unwrap();
    assert_eq!(action, REDIRECT, "{what}");
    assert_eq!(books(), (before.0 + 1, before.1, before.2), "{what}");
    out
}

#[test]
fn every_fast_kind_is_sent_on_whole_behind_its_headers() -> anyhow::Result<()> {
    for (ends, len) in [(V4, OUTER_V4), (V6, OUTER_V6)] {
        let bench = departed(ends)?;
        for (name, frame) in fast_frames() {
            let out = is_sent_on(&bench, name, &frame);
            assert_eq!(out[len..], frame, "{name}");
            let port = source_port(bucket(&FrameBytes(&frame))).to_be_bytes();
            assert_eq!(out[len - 16..len - 14], port, "{name}");
        }
        for (name, frame) in other_frames() {
            bench.is_left(name, &frame, 0);
        }
        let mut echo = plain();
        echo[6..12].copy_from_slice(&POD);
        bench.is_left("the pod's own echo", &echo, 1);
    }
    Ok(())
}

/// What leaves a real VXLAN device in metadata mode's place: one that leads to the same node, over a TAP that leaves no checksum to others.
fn by_the_kernel(ends: Ends, frames: &[Vec<u8>]) -> anyhow::Result<Vec<Vec<u8>>> {
    let netns = Netns::new()?;
    let tap = netns.spawn(|| open_tap("und0")).join().expect("no panic")?;
    netns.ip("link set und0 address 02:00:00:00:00:97")?;
    netns.ip("link set und0 mtu 1700 up")?;
    let (checksum, own, remote) = match ends {
        Ends::V4(..) => ("noudpcsum", "10.78.0.1/24", "10.78.0.2"),
        Ends::V6(..) => ("noudp6zerocsumtx", "fd78::1/64 nodad", "fd78::2"),
    };
    netns.ip(&format!("addr add {own} dev und0"))?;
    netns.ip(&format!(
        "neigh add {remote} lladdr 02:00:00:00:00:98 dev und0 nud permanent"
    ))?;
    netns.ip(&format!(
        "link add vx type vxlan id {VNI} remote {remote} dev und0 dstport {PORT} ttl 64 {checksum}"
    ))?;
    netns.ip("link set vx mtu 1500 up")?;
    let sender = netns.spawn(|| PacketSocket::sender("vx", 1 << 20));
    let sender = sender.join().expect("no panic")?;
    let mut packets = Vec::new();
    for frame in frames {
        // Behind an empty virtio-net header.
        ensure!(
            sender.send(&[&[0; VNET_HEADER][..], frame].concat())?,
            "no room"
        );
        packets.push(read(&tap, frame)?);
    }
    Ok(packets)
}

/// The packet around `frame`; the device sends others of its own.
fn read(tap: &impl AsFd, frame: &[u8]) -> anyhow::Result<Vec<u8>> {
    let until = Instant::now() + Duration::from_secs(10);
    let mut buffer = vec![0; 4096];
    loop {
        ensure!(Instant::now() < until, "no packet");
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(1_000u16))? > 0 {
            let len = nix::unistd::read(tap.as_fd(), &mut buffer)?;
            // What the TAP's flags put in front of it says nothing: the kernel finishes all for such a reader.
            let packet = &buffer[VNET_HEADER..len];
            if packet.ends_with(frame) {
                return Ok(packet.to_vec());
            }
        }
    }
}

/// Blanks what is another one in each packet: identification, IPv4 header checksum, source port, and the checksum over it.
fn alike(ends: Ends, mut packet: Vec<u8>) -> Vec<u8> {
    let blanks: &[std::ops::Range<usize>] = match ends {
        Ends::V4(..) => &[18..20, 24..26, 34..36],
        Ends::V6(..) => &[54..56, 60..62],
    };
    for range in blanks {
        packet[range.clone()].fill(0);
    }
    packet
}

/// The sum that a receiver finds over the outer UDP datagram and its pseudo-header.
fn udp_sum(packet: &[u8]) -> u16 {
    let mut bytes = [&packet[22..54], &packet[54..]].concat();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let pairs = bytes.chunks(2);
    let sum: u64 = pairs
        .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    migrator_ebpf::fold(sum + 17 + packet.len() as u64 - 54)
}

#[test]
fn what_is_sent_on_is_what_the_kernels_tunnel_makes_of_it() -> anyhow::Result<()> {
    let mut frames: Vec<_> = fast_frames().into_iter().map(|(_, frame)| frame).collect();
    // One of an odd length.
    frames.push(frame(POD, 0x0800, &ipv4(UDP, 0, 0, &udp(19, 0))));
    for ends in [V4, V6] {
        let bench = departed(ends)?;
        for (frame, expected) in frames.iter().zip(by_the_kernel(ends, &frames)?) {
            let out = is_sent_on(&bench, "a frame", frame);
            match ends {
                Ends::V4(..) => {
                    let sum: u64 = out[14..34]
                        .chunks(2)
                        .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])))
                        .sum();
                    assert_eq!(migrator_ebpf::fold(sum), 0xffff, "{out:02x?}");
                }
                Ends::V6(..) => {
                    assert_eq!(udp_sum(&expected), 0xffff, "{expected:02x?}");
                    assert_eq!(udp_sum(&out), 0xffff, "{out:02x?}");
                }
            }
            assert_eq!(alike(ends, out), alike(ends, expected));
        }
    }
    Ok(())
}

#[test]
fn an_unfinished_checksum_is_finished_before_it_is_covered() -> anyhow::Result<()> {
    for (ends, len) in [(V4, OUTER_V4), (V6, OUTER_V6)] {
        let mut bench = departed(ends)?;
        let mut partial = frame(POD, 0x0800, &ipv4(UDP, 0, 0, &udp(55, 0)));
        // 10.77.0.1, 10.77.0.10, UDP, 63 bytes.
        let pseudo = 2 * (10 * 256 + 77) + 1 + 10 + 17 + 63;
        partial[40..42].copy_from_slice(&u16::to_be_bytes(pseudo));
        let out = is_sent_on(&bench, "unfinished", &partial);
        bench.set(Mode::Local)?;
        let (_, straight) = bench.run(&partial)?;
        assert_ne!(straight, partial);
        assert_eq!(out[len..], straight);
        if len == OUTER_V6 {
            assert_eq!(udp_sum(&out), 0xffff);
        }
    }
    Ok(())
}

#[test]
fn without_a_way_out_everything_takes_the_kernels_way() -> anyhow::Result<()> {
    let mut bench = departed(V4)?;
    let udp = plain();
    bench.ways_out.remove(LOOPBACK)?;
    bench.is_left("no device", &udp, 1);
    bench.ways_out.insert(LOOPBACK, LOOPBACK, None, 0)?;
    bench.arrive(&udp, 1)?;
    is_sent_on(&bench, "a device", &udp);
    bench.outers.remove(&u32::from(SLOT))?;
    bench.set(Mode::Tunnel)?;
    bench.is_left("no headers", &udp, 1);
    for mode in [Mode::Forward, Mode::Hold, Mode::Shut] {
        let mut bench = departed(V4)?;
        bench.set(mode)?;
        bench.is_left("another mode", &udp, 1);
    }
    Ok(())
}

#[test]
fn a_bucket_is_sent_on_once_all_before_has_arrived_and_is_done_and_then_for_good()
-> anyhow::Result<()> {
    let mut bench = departed(V4)?;
    let udp = plain();
    let index = Bench::index(&udp);
    bench.passed.set(index, 1, 0)?;
    bench.is_left("one is under way", &udp, 1);
    bench.arrive(&udp, 2)?;
    bench.parked.set(index, 2, 0)?;
    bench.done.set(index, 1, 0)?;
    bench.is_left("one is relayed", &udp, 1);
    bench.arrive(&udp, 1)?;
    bench.done.set(index, 2, 0)?;
    is_sent_on(&bench, "all is done", &udp);
    bench.parked.set(index, 9, 0)?;
    bench.passed.set(index, 9, 0)?;
    is_sent_on(&bench, "latched", &udp);
    let word = bench.gates.get(&u32::from(SLOT), 0)?;
    bench.gates.set(u32::from(SLOT), settle(word), 0)?;
    is_sent_on(&bench, "the same flip", &udp);
    bench.set(Mode::Tunnel)?;
    bench.is_left("another one", &udp, 1);
    Ok(())
}

#[test]
fn a_frame_that_is_too_long_spills_its_bucket_for_good() -> anyhow::Result<()> {
    let mut bench = departed(V4)?;
    let (short, other) = (plain(), fast_frames().remove(1).1);
    let long = frame(POD, 0x0800, &ipv4(UDP, 0, 0, &udp(1473, 0)));
    let several = 1 << 20;
    bench.is_left("nothing was sent before it", &long, several);
    bench.arrive(&long, several)?;
    is_sent_on(&bench, "so the bucket is free", &short);
    bench.is_left("too long", &long, several);
    bench.arrive(&long, several)?;
    bench.is_left("must not overtake it", &short, 1);
    is_sent_on(&bench, "another bucket", &other);
    // Longer than the way takes, and not longer than the pod.
    let narrow = Outer {
        frame_max: 60,
        ..outer(V4)
    };
    bench.outers.insert(u32::from(SLOT), narrow, 0)?;
    bench.set(Mode::Tunnel)?;
    bench.arrive(&short, 1)?;
    is_sent_on(&bench, "under another word", &short);
    let longer = frame(POD, 0x0800, &ipv4(UDP, 0, 0, &udp(19, 0)));
    bench.is_left("61 bytes", &longer, 1);
    bench.arrive(&longer, 1)?;
    bench.is_left("must not overtake it either", &short, 1);
    Ok(())
}

#[test]
fn the_gate_relays_what_the_uplinks_program_did_not_send_on() -> anyhow::Result<()> {
    let mut bench = departed(V4)?;
    let device = Device {
        park: LOOPBACK,
        out: 0,
        tunnel: 0,
        uplink: LOOPBACK,
        slot: SLOT,
        mac: POD,
    };
    bench.devices.insert(LOOPBACK, device, 0)?;
    for (name, frame) in fast_frames() {
        let before = bench.count(Counter::ParkedForward)?;
        assert_eq!(gate_counts(&bench, &frame)?, 1, "{name}");
        assert_eq!(bench.count(Counter::ParkedForward)?, before + 1, "{name}");
    }
    assert_eq!(bench.count(Counter::ForwardedTunnel)?, 0);
    Ok(())
}

#[test]
fn a_watched_pod_shows_the_frame_that_is_sent_on_without_its_headers() -> anyhow::Result<()> {
    let mut bench = departed(V6)?;
    bench.trace.set(u32::from(SLOT), u64::MAX, 0)?;
    for (name, frame) in fast_frames() {
        is_sent_on(&bench, name, &frame);
        let event = bench.ring.next().expect(name);
        let event = TraceEvent::from_bytes(&event).expect("a whole event");
        assert_eq!(event.counter(), Some(Counter::ForwardedXdp), "{name}");
        assert_eq!(event.direction(), Direction::In, "{name}");
        assert_eq!(event.length as usize, frame.len(), "{name}");
        assert_eq!(
            event.head(),
            &frame[..frame.len().min(TRACE_HEAD)],
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn the_services_question_takes_this_way_in_any_mode_and_is_booked_nowhere() -> anyhow::Result<()> {
    let mut bench = departed(V4)?;
    let question = Probe {
        slot: SLOT,
        number: 9,
    };
    let mut question = question.ask(POD).to_vec();
    question.resize(1514, 0);
    bench.set(Mode::Forward)?;
    // A test run's frame comes by the loopback device, unless it is told otherwise.
    let (action, out) = bench.run(&question)?;
    assert_eq!((action, &out[OUTER_V4..]), (REDIRECT, &question[..]));
    assert_eq!(bench.count(Counter::ForwardedXdp)?, 0);
    bench.outers.remove(&u32::from(SLOT))?;
    assert_eq!(bench.run(&question)?, (PASS, question));
    Ok(())
}
