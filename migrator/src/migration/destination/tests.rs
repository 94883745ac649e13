use super::*;
use crate::wire::golden::offer;
use crate::wire::message::{Control, DiskAck, DiskOffer, DisksDone, MemoryDone, StateEnd};

/// What must have come before the guest can be granted, in any order.
#[derive(Clone, Copy, Debug)]
enum Last {
    Handover,
    MemoryDone,
    RoundPlaced,
    StateEnd,
    VmPrepared,
}

impl Last {
    fn input(self) -> Input {
        let handover = Handover {
            stopped_at_unix_us: 1,
            agent: Vec::new(),
        };
        match self {
            Self::Handover => Input::Peer(handover.into()),
            Self::MemoryDone => Input::Peer(MemoryDone { round: 2, pages: 1 }.into()),
            Self::RoundPlaced => Input::RoundPlaced { round: 2 },
            Self::StateEnd => Input::Peer(Control::from(StateEnd { bytes: 1 })),
            Self::VmPrepared => Input::VmPrepared,
        }
    }
}

fn permutations(items: &[Last]) -> Vec<Vec<Last>> {
    if items.is_empty() {
        return vec![Vec::new()];
    }
    (0..items.len())
        .flat_map(|first| {
            let mut rest = items.to_vec();
            let first = rest.remove(first);
            permutations(&rest).into_iter().map(move |mut order| {
                order.insert(0, first);
                order
            })
        })
        .collect()
}

#[test]
fn whatever_comes_last_begins_the_load_and_the_end_of_the_state_ends_it() {
    use Last::{Handover, MemoryDone, RoundPlaced, StateEnd, VmPrepared};
    for order in permutations(&[Handover, MemoryDone, RoundPlaced, StateEnd, VmPrepared]) {
        let mut machine = Destination::new(Box::new(offer()), "a".to_owned());
        machine.handle(0, Input::Begin);
        machine.handle(0, Input::Checked(Ok(Vec::new())));
        machine.handle(0, Input::MemoryPrepared);
        machine.handle(0, Input::RoundPlaced { round: 1 });
        let outputs: Vec<_> = order
            .iter()
            .flat_map(|last| machine.handle(0, last.input()))
            .collect();
        let steps: Vec<_> = outputs
            .iter()
            .filter(|output| matches!(output, Output::LoadState | Output::EndState))
            .collect();
        assert!(
            matches!(steps[..], [Output::LoadState, Output::EndState]),
            "{order:?}: {outputs:?}"
        );
    }
}

/// A machine whose pod has a disk, up to where its state loads.
fn loading() -> Destination {
    let mut offer = offer();
    offer.options.verify = false;
    offer.disks.push(DiskOffer {
        name: "root".to_owned(),
        size: 1 << 20,
        allocated: 0,
    });
    let mut machine = Destination::new(Box::new(offer), "a".to_owned());
    machine.handle(0, Input::Begin);
    machine.handle(0, Input::Checked(Ok(Vec::new())));
    machine.handle(0, Input::MemoryPrepared);
    let acked = machine.handle(0, Input::BlocksPlaced { round: 1 });
    assert_eq!(acked, [Output::Send(DiskAck { round: 1 }.into())]);
    for last in [
        Last::VmPrepared,
        Last::RoundPlaced,
        Last::MemoryDone,
        Last::Handover,
        Last::StateEnd,
    ] {
        machine.handle(0, last.input());
    }
    machine
}

fn is_ready(outputs: &[Output]) -> bool {
    let ready = |output: &Output| matches!(output, Output::Send(Control::Ready(_)));
    outputs.iter().any(ready)
}

#[test]
fn it_is_not_ready_before_the_last_round_of_disks_is_durable() {
    let done = || Input::Peer(DisksDone { round: 2, bytes: 1 }.into());
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let mut machine = loading();
        let ready = order.map(|which| {
            let input = match which {
                0 => Input::StateLoaded,
                1 => done(),
                _ => Input::BlocksPlaced { round: 2 },
            };
            is_ready(&machine.handle(0, input))
        });
        assert_eq!(ready, [false, false, true], "{order:?}");
    }
}
