//! The node's own addresses.

use std::net::IpAddr;

use netlink_packet_route::address::AddressAttribute;

use super::Netlink;
use crate::network::error::NetlinkError;

impl Netlink {
    /// All addresses of the node.
    pub(crate) async fn addresses(&self) -> Result<Vec<IpAddr>, NetlinkError> {
        let dumped = self.dump(|| self.handle.address().get().execute()).await;
        let messages = dumped
            .map_err(|source| NetlinkError::new("read the addresses of", "the node", source))?;
        let attributes = messages.into_iter().flat_map(|message| message.attributes);
        // A point-to-point link's `Address` is the other end's, and `Local` its own (linux/if_addr.h); IPv6 has `Address` alone.
        Ok(attributes
            .filter_map(|attribute| match attribute {
                AddressAttribute::Address(address) | AddressAttribute::Local(address) => {
                    Some(address)
                }
                _ => None,
            })
            .collect())
    }
}
