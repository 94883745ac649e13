//! Links, bridge ports and forwarding entries, routes and neighbours, by rtnetlink.

mod address;
mod dump;
mod hop;
mod routes;
mod vxlan;

pub(crate) use hop::{Hop, NoHop};
pub(crate) use vxlan::VxlanError;

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridge, InfoData, InfoKind, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage, neighbour::NeighbourAttribute};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::{Handle, LinkBridgePort, LinkUnspec};
use vm_runtime::units::MacAddress;

use super::error::NetlinkError;

/// Frames that a TAP keeps for a reader that has stopped. The most a TAP takes, and more than a
/// gigabit link carries in half a second of full frames.
pub(crate) const QUEUE_FRAMES: u32 = 65536;

/// linux/rtnetlink.h and errno: no such entry, no such device.
const ENOENT: i32 = libc::ENOENT;
const ENODEV: i32 = libc::ENODEV;

/// What is read of a link.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) mac: MacAddress,
    pub(crate) mtu: u32,
    /// Frames that the device took and dropped.
    pub(crate) tx_dropped: u64,
    /// Frames that it could not send, or took from the network and dropped.
    pub(crate) other_drops: u64,
    /// Frames that it keeps for its reader at most.
    pub(crate) queue: u32,
    pub(crate) up: bool,
    /// Receive queues that it has at most.
    pub(crate) rx_queues: u32,
    /// A bridge that tells VLANs apart.
    pub(crate) vlan_filtering: bool,
    /// One end of a virtual cable.
    pub(crate) is_veth: bool,
}

/// The service's rtnetlink socket, in the namespace of the thread that opened it.
#[derive(Clone, Debug)]
pub(crate) struct Netlink {
    handle: Handle,
    /// Held while a table is read.
    dumps: Arc<tokio::sync::Mutex<()>>,
}

impl Netlink {
    /// Opens the socket, and serves it on the current tokio runtime.
    pub(crate) fn open() -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            dumps: Arc::default(),
        })
    }

    /// A link by name; `None` if there is none.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut found = self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute();
        match found.try_next().await {
            Ok(message) => Ok(message.map(|message| read_link(&message))),
            Err(error) if is_errno(&error, &[ENODEV, ENOENT]) => Ok(None),
            Err(source) => Err(NetlinkError::new("read the link", name, source)),
        }
    }

    /// A link that must be there.
    pub(crate) async fn require(&self, name: &str) -> Result<Link, NetlinkError> {
        self.link(name)
            .await?
            .ok_or_else(|| NetlinkError::Missing(name.to_owned()))
    }

    /// Prepares a park: a long queue, no addresses, up.
    pub(crate) async fn raise_park(&self, name: &str, mtu: u32) -> Result<Link, NetlinkError> {
        let link = self.require(name).await?;
        self.make_silent(name, link.index).await?;
        self.set(name, quiet(link.index, mtu).up().build()).await?;
        Ok(link)
    }

    /// Prepares a pod's TAP: a long queue, no addresses, a port of the bridge that neither learns from
    /// the guest nor gets frames for unknown addresses, up.
    ///
    /// A bridge takes the lowest MAC of its ports for its own, unless one was set: so the host's side of
    /// the TAP gets a high one, or every new pod could change the address that the node itself has.
    pub(crate) async fn raise_tap(
        &self,
        name: &str,
        bridge: Link,
        MacAddress(mac): MacAddress,
    ) -> Result<(), NetlinkError> {
        let link = self.require(name).await?;
        self.make_silent(name, link.index).await?;
        // Locally administered, unicast, not the guest's own in any case, and about as high as can be: a bridge that nobody has given an
        // address takes the lowest of its ports, and must not take this one.
        let [a, b, c, d, e, f] = mac;
        let second = if (a, b) == (0xfe, 0xff) { 0xfe } else { 0xff };
        let message = quiet(link.index, bridge.mtu)
            .address(vec![0xfe, second, c, d, e, f])
            .controller(bridge.index)
            .build();
        self.set(name, message).await?;
        let port = LinkBridgePort::new(link.index)
            .learning(false)
            .flood(false)
            .build();
        self.set(name, port).await?;
        let up = LinkUnspec::new_with_index(link.index).up().build();
        self.set(name, up).await
    }

    /// Takes the queueing discipline off a pod's TAP, before it is up: a frame is then in the TAP's queue when its sender's call returns. With
    /// one, another CPU may be handing it over still, when a redirected frame of its flow gets there.
    pub(crate) async fn make_queueless(&self, name: &str) -> Result<(), NetlinkError> {
        let index = self.require(name).await?.index;
        let index = i32::try_from(index).map_err(|_| NetlinkError::Missing(name.to_owned()))?;
        let mut message = TcMessage::with_index(index);
        message.header.parent = TcHandle::ROOT;
        message
            .attributes
            .push(TcAttribute::Kind("noqueue".to_owned()));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let refused = |source| NetlinkError::new("take the queueing discipline off", name, source);
        let mut answers = self.handle.clone().request(request).map_err(refused)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(refused(rtnetlink::Error::NetlinkError(error)));
            }
        }
        Ok(())
    }

    /// The device must never send a frame of its own: no IPv6 address, so no discovery either.
    async fn make_silent(&self, name: &str, index: u32) -> Result<(), NetlinkError> {
        let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]))
            .build();
        match self.handle.link().change(message).execute().await {
            Ok(()) => Ok(()),
            // A kernel or namespace without IPv6 has nothing to silence.
            Err(error) if is_errno(&error, &[libc::EAFNOSUPPORT, libc::EINVAL]) => Ok(()),
            Err(source) => Err(NetlinkError::new("silence IPv6 on", name, source)),
        }
    }

    async fn set(&self, name: &str, message: LinkMessage) -> Result<(), NetlinkError> {
        // RTM_NEWLINK: the kernel reads a bridge port's settings from no other message.
        let request = self.handle.link().change(message);
        request
            .execute()
            .await
            .map_err(|source| NetlinkError::new("configure the link", name, source))
    }

    /// Removes a link; one that is gone already is fine.
    pub(crate) async fn delete(&self, name: &str) -> Result<(), NetlinkError> {
        let Some(link) = self.link(name).await? else {
            return Ok(());
        };
        match self.handle.link().del(link.index).execute().await {
            Ok(()) => Ok(()),
            Err(error) if is_errno(&error, &[ENODEV, ENOENT]) => Ok(()),
            Err(source) => Err(NetlinkError::new("remove the link", name, source)),
        }
    }

    /// Sends frames for `mac` to a port of the bridge, whatever the bridge learned or will see: static
    /// (no ageing) and sticky (a frame from that address elsewhere does not move it).
    pub(crate) async fn own_address(
        &self,
        name: &str,
        port: u32,
        mac: MacAddress,
    ) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(port, &mac.0)
            .state(NeighbourState::Noarp)
            .flags(NeighbourFlags::Controller | NeighbourFlags::Sticky)
            .replace();
        request
            .execute()
            .await
            .map_err(|source| NetlinkError::new("own the pod's address on", name, source))
    }

    /// Takes the entry away; one that is gone already is fine.
    pub(crate) async fn disown_address(
        &self,
        name: &str,
        port: u32,
        mac: MacAddress,
    ) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = port;
        message.header.state = NeighbourState::Noarp;
        message.header.flags = NeighbourFlags::Controller;
        let address = NeighbourAttribute::LinkLayerAddress(mac.0.to_vec());
        message.attributes.push(address);
        match self.handle.neighbours().del(message).execute().await {
            Ok(()) => Ok(()),
            Err(error) if is_errno(&error, &[ENODEV, ENOENT, libc::EINVAL]) => Ok(()),
            Err(source) => Err(NetlinkError::new(
                "give up the pod's address on",
                name,
                source,
            )),
        }
    }
}

fn quiet(index: u32, mtu: u32) -> rtnetlink::LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(index)
        .txqueuelen(QUEUE_FRAMES)
        .mtu(mtu)
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        mac: MacAddress([0; 6]),
        mtu: 1500,
        tx_dropped: 0,
        other_drops: 0,
        queue: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        rx_queues: 1,
        vlan_filtering: false,
        is_veth: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => {
                link.mac = mac.as_slice().try_into().map_or(link.mac, MacAddress);
            }
            LinkAttribute::Stats64(stats) => {
                link.tx_dropped = stats.tx_dropped;
                link.other_drops = stats.tx_errors + stats.rx_dropped;
            }
            LinkAttribute::TxQueueLen(frames) => link.queue = *frames,
            LinkAttribute::NumRxQueues(queues) => link.rx_queues = *queues,
            LinkAttribute::LinkInfo(info) => {
                link.vlan_filtering = filters_vlans(info);
                link.is_veth = info.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            _ => {}
        }
    }
    link
}

fn filters_vlans(info: &[LinkInfo]) -> bool {
    info.iter().any(|info| match info {
        LinkInfo::Data(InfoData::Bridge(settings)) => {
            settings.contains(&InfoBridge::VlanFiltering(true))
        }
        _ => false,
    })
}

fn is_errno(error: &rtnetlink::Error, errnos: &[i32]) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            errnos.iter().any(|errno| message.raw_code() == -errno)
        }
        _ => false,
    }
}
