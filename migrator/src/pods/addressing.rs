//! A pod's addresses as its node's network has them. Pure.
//!
//! On a bridge they are what the pod's file says. Where pods are routed, each address is a network of its own, whatever prefix the file
//! names, and the gateways are the same for every pod on every node.

use std::net::IpAddr;

use vm_runtime::agent_client as agent;
use vm_runtime::pod::{PodNet, PodSpec};

use crate::network::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, PodNetworks};

/// Why a pod cannot have its addresses on a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No node would send anything there.
    #[error(
        "its address {address} is in none of the networks that the pods of this cluster have ({pods}): choose one of these, or add its network to `topology.pods` on every node"
    )]
    Elsewhere {
        /// The address.
        address: IpAddr,
        /// Where it could be.
        pods: PodNetworks,
    },
    /// A gateway was named.
    #[error(
        "metadata.annotations[\"migrator/{annotation}\"]: this node's pods are routed, and have the gateway {gateway} whatever their address: remove this annotation"
    )]
    Gateway {
        /// The annotation's name.
        annotation: &'static str,
        /// The one that the pod gets.
        gateway: IpAddr,
    },
}

/// Fits the addresses of a new pod to a routed network.
///
/// # Errors
/// See [`AddressError`].
pub fn route(spec: &mut PodSpec, pods: &PodNetworks) -> Result<(), AddressError> {
    let net = &mut spec.net;
    let gateway = |annotation, gateway: IpAddr| AddressError::Gateway {
        annotation,
        gateway,
    };
    if net.gateway4.is_some() {
        return Err(gateway("gateway4", GATEWAY_V4.into()));
    }
    if net.gateway6.is_some() {
        return Err(gateway("gateway6", GATEWAY_V6.into()));
    }
    check(net, pods)?;
    if let Some((address, _)) = net.ipv4 {
        net.ipv4 = Some((address, 32));
        net.gateway4 = Some(GATEWAY_V4);
    }
    if let Some((address, _)) = net.ipv6 {
        net.ipv6 = Some((address, 128));
        net.gateway6 = Some(GATEWAY_V6);
    }
    Ok(())
}

/// Whether all addresses of a pod are among those of the cluster.
///
/// # Errors
/// [`AddressError::Elsewhere`].
pub fn check(net: &PodNet, pods: &PodNetworks) -> Result<(), AddressError> {
    let v4 = net.ipv4.map(|(address, _)| IpAddr::V4(address));
    let v6 = net.ipv6.map(|(address, _)| IpAddr::V6(address));
    match v4.into_iter().chain(v6).find(|a| pods.of(*a).is_none()) {
        Some(address) => Err(AddressError::Elsewhere {
            address,
            pods: pods.clone(),
        }),
        None => Ok(()),
    }
}

/// The pod's interface, as its agent is told; `routed_mtu` is the longest packet of pods that are routed.
pub fn interface(net: &PodNet, routed_mtu: Option<u32>) -> agent::Interface {
    let v4 = net
        .ipv4
        .map(|(address, prefix)| (IpAddr::V4(address), prefix));
    let v6 = net
        .ipv6
        .map(|(address, prefix)| (IpAddr::V6(address), prefix));
    let g4 = net.gateway4.map(IpAddr::V4);
    let g6 = net.gateway6.map(IpAddr::V6);
    let gateways: Vec<IpAddr> = g4.into_iter().chain(g6).collect();
    // Nobody answers for a gateway that is on every TAP of every node: the guest knows where it is.
    let neighbours = match routed_mtu {
        Some(_) => gateways.iter().map(|at| (*at, GATEWAY_MAC.0)).collect(),
        None => Vec::new(),
    };
    agent::Interface {
        mac: net.mac.0,
        addresses: v4.into_iter().chain(v6).collect(),
        gateways,
        neighbours,
        mtu: routed_mtu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::golden::offer;

    fn pods(list: &[&str]) -> PodNetworks {
        let list: Vec<_> = list.iter().map(|text| text.parse().unwrap()).collect();
        list.try_into().unwrap()
    }

    fn pod() -> PodSpec {
        let mut pod = offer().pod;
        pod.net.ipv4 = Some(("10.77.0.10".parse().unwrap(), 24));
        pod.net.ipv6 = Some(("fd77::10".parse().unwrap(), 64));
        pod
    }

    #[test]
    fn each_address_becomes_a_network_of_its_own_with_the_gateway_of_all() {
        let mut spec = pod();
        route(&mut spec, &pods(&["10.77.0.0/16", "fd77::/64"])).unwrap();
        let interface = interface(&spec.net, Some(1430));
        let of = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(
            interface.addresses,
            [(of("10.77.0.10"), 32), (of("fd77::10"), 128)]
        );
        assert_eq!(interface.gateways, [of("169.254.1.1"), of("fe80::1")]);
        assert_eq!(
            interface.neighbours,
            [(of("169.254.1.1"), [0xee; 6]), (of("fe80::1"), [0xee; 6])]
        );
        assert_eq!(interface.mtu, Some(1430));
        // What a peer sends is checked by the same rules as a file.
        spec.net.ipv6 = None;
        spec.net.gateway6 = None;
        spec.containers = pod_with_container().containers;
        spec.validate().unwrap();
    }

    fn pod_with_container() -> PodSpec {
        PodSpec::from_yaml(
            "{apiVersion: v1, kind: Pod, metadata: {name: p, annotations: {migrator/ipv4: 10.77.0.9/24}}, \
             spec: {containers: [{name: c, image: i, resources: {limits: {memory: 64Mi}}}]}}",
        )
        .unwrap()
    }

    #[test]
    fn a_pod_of_one_family_has_one_gateway() {
        let mut spec = pod();
        spec.net.ipv6 = None;
        route(&mut spec, &pods(&["10.77.0.0/16"])).unwrap();
        assert_eq!(interface(&spec.net, Some(1430)).gateways.len(), 1);
    }

    #[test]
    fn addresses_and_gateways_that_cannot_be_are_refused_with_what_to_do() {
        let error = route(&mut pod(), &pods(&["10.77.0.0/24"])).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("fd77::10") && text.contains("10.77.0.0/24"),
            "{text}"
        );
        let mut spec = pod();
        spec.net.gateway4 = Some("10.77.0.1".parse().unwrap());
        let text = route(&mut spec, &pods(&["10.77.0.0/24", "fd77::/64"]))
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("migrator/gateway4") && text.contains("169.254.1.1"),
            "{text}"
        );
    }

    #[test]
    fn on_a_bridge_a_pod_has_what_its_file_says() {
        let mut spec = pod();
        spec.net.gateway4 = Some("10.77.0.1".parse().unwrap());
        let interface = interface(&spec.net, None);
        assert!(interface.neighbours.is_empty() && interface.mtu.is_none());
        assert_eq!(interface.addresses[0].1, 24);
    }
}
