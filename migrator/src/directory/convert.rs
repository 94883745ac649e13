//! Between the table's claims and the wire's. Pure.

use vm_runtime::units::MacAddress;

use crate::network::{Claim, Wanted};
use crate::wire::message::{EndWanted, PodPlace};

pub(super) fn to_wire(claim: &Claim) -> PodPlace {
    PodPlace {
        mac: claim.mac.0,
        v4: claim.v4.map(|v4| v4.octets()),
        v6: claim.v6.map(|v6| v6.octets()),
        epoch: claim.epoch,
    }
}

/// `None`: a group's address, or no address at all.
pub(super) fn from_wire(place: &PodPlace) -> Option<Claim> {
    let claim = Claim {
        mac: MacAddress(place.mac),
        v4: place.v4.map(Into::into),
        v6: place.v6.map(Into::into),
        epoch: place.epoch,
    };
    let group = claim.mac.0[0] & 1 == 1
        || claim
            .v4
            .is_some_and(|v4| v4.is_multicast() || v4.is_broadcast())
        || claim.v6.is_some_and(|v6| v6.is_multicast());
    // One that is mapped would be another pod's IPv4 address.
    let mapped = claim.v6.is_some_and(|v6| v6.to_ipv4_mapped().is_some());
    let any = claim.v4.is_some() || claim.v6.is_some();
    (any && !group && !mapped).then_some(claim)
}

pub(super) fn wanted_to_wire(wanted: &Wanted) -> EndWanted {
    EndWanted {
        pod: to_wire(&wanted.pod),
        at: wanted.at.clone(),
        nonce: wanted.nonce,
    }
}

pub(super) fn wanted_from_wire(wanted: EndWanted) -> Option<Wanted> {
    Some(Wanted {
        pod: from_wire(&wanted.pod)?,
        at: wanted.at,
        nonce: wanted.nonce,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_runtime::units::Epoch;

    use super::*;

    fn place() -> PodPlace {
        PodPlace {
            mac: [0x52, 0x54, 0, 0, 0, 9],
            v4: Some([10, 77, 0, 9]),
            v6: Some([0xfd; 16]),
            epoch: Epoch(3),
        }
    }

    #[test]
    fn a_claim_crosses_unchanged() {
        let claim = from_wire(&place()).unwrap();
        assert_eq!(to_wire(&claim), place());
        let wanted = Wanted {
            pod: claim,
            at: "b".to_owned(),
            nonce: 7,
        };
        assert_eq!(wanted_from_wire(wanted_to_wire(&wanted)), Some(wanted));
    }

    #[test]
    fn addresses_that_no_pod_has_are_refused() {
        let mut mapped = [0; 16];
        (mapped[10], mapped[11]) = (0xff, 0xff);
        for bad in [
            PodPlace {
                mac: [1; 6],
                ..place()
            },
            PodPlace {
                v4: Some([224, 0, 0, 1]),
                ..place()
            },
            PodPlace {
                v4: Some([255; 4]),
                ..place()
            },
            PodPlace {
                v6: Some([0xff; 16]),
                ..place()
            },
            PodPlace {
                v6: Some(mapped),
                ..place()
            },
            PodPlace {
                v4: None,
                v6: None,
                ..place()
            },
        ] {
            assert_eq!(from_wire(&bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_accepted_crosses_unchanged(
            mac in any::<[u8; 6]>(), v4 in any::<Option<[u8; 4]>>(), v6 in any::<Option<[u8; 16]>>(), epoch in any::<u64>(),
        ) {
            let place = PodPlace { mac, v4, v6, epoch: Epoch(epoch) };
            if let Some(claim) = from_wire(&place) {
                prop_assert_eq!(to_wire(&claim), place);
            }
        }
    }
}
