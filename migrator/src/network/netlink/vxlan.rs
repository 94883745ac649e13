//! The tunnel's device.

use futures::TryStreamExt;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkUnspec, LinkVxlan};

use super::{Netlink, is_errno};
use crate::network::error::NetlinkError;

/// Why there is no VXLAN device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VxlanError {
    #[error(
        "this kernel has no VXLAN: load its module (modprobe vxlan), or boot one with CONFIG_VXLAN"
    )]
    Unsupported,
    #[error(
        "UDP port {port} is taken by another VXLAN device or program: set another `tunnel.port`, the same on every node"
    )]
    PortTaken { port: u16 },
    #[error("`{0}` is the name of a link that is no tunnel of this service: remove or rename it")]
    NotOurs(String),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// What there is under a name.
enum Found {
    Nothing,
    /// Its index, and its port if it is as a tunnel must be.
    Vxlan(u32, Option<u16>),
    Other,
}

impl Netlink {
    /// Makes the tunnel's device, or takes over one that is as it should be. Returns its index, and whether it is new.
    pub(crate) async fn raise_vxlan(
        &self,
        name: &str,
        port: u16,
    ) -> Result<(u32, bool), VxlanError> {
        let is_new = match self.find_vxlan(name).await? {
            Found::Vxlan(_, Some(its)) if its == port => false,
            Found::Vxlan(..) => {
                self.delete(name).await?;
                true
            }
            Found::Other => return Err(VxlanError::NotOurs(name.to_owned())),
            Found::Nothing => true,
        };
        let refused = |source: rtnetlink::Error| {
            if is_errno(&source, &[libc::EOPNOTSUPP]) {
                VxlanError::Unsupported
            } else if is_errno(&source, &[libc::EADDRINUSE, libc::EEXIST]) {
                VxlanError::PortTaken { port }
            } else {
                NetlinkError::new("create the tunnel", name, source).into()
            }
        };
        if is_new {
            // Metadata mode knows no identifier of its own: the programs give and check one for each frame.
            let message = LinkVxlan::new(name, 0)
                .port(port)
                .collect_metadata(true)
                .learning(false)
                .build();
            let request = self.handle.link().add(message).execute();
            request.await.map_err(refused)?;
        }
        let link = self.require(name).await?;
        self.make_silent(name, link.index).await?;
        // Only now the kernel takes the port.
        let up = LinkUnspec::new_with_index(link.index).up().build();
        let raised = self.handle.link().change(up).execute().await;
        if let Err(source) = raised {
            self.delete(name).await?;
            return Err(refused(source));
        }
        Ok((link.index, is_new))
    }

    /// Takes the tunnel's device away; one that is gone already, or is something else, is left alone.
    pub(crate) async fn delete_vxlan(&self, name: &str) -> Result<(), NetlinkError> {
        match self.find_vxlan(name).await? {
            Found::Vxlan(..) => self.delete(name).await,
            Found::Nothing | Found::Other => Ok(()),
        }
    }

    /// Index of the device if [`raise_vxlan`](Self::raise_vxlan) would take it over.
    pub(crate) async fn kept_vxlan(
        &self,
        name: &str,
        port: u16,
    ) -> Result<Option<u32>, NetlinkError> {
        match self.find_vxlan(name).await? {
            Found::Vxlan(index, Some(its)) if its == port => Ok(Some(index)),
            Found::Vxlan(..) | Found::Nothing | Found::Other => Ok(None),
        }
    }

    async fn find_vxlan(&self, name: &str) -> Result<Found, NetlinkError> {
        let links = self.handle.link();
        let mut found = links.get().match_name(name.to_owned()).execute();
        match found.try_next().await {
            Ok(Some(message)) => Ok(read(&message)),
            Ok(None) => Ok(Found::Nothing),
            Err(error) if is_errno(&error, &[libc::ENODEV, libc::ENOENT]) => Ok(Found::Nothing),
            Err(source) => Err(NetlinkError::new("read the link", name, source)),
        }
    }
}

fn read(message: &LinkMessage) -> Found {
    let (mut is_vxlan, mut port, mut metadata, mut learns) = (false, None, false, true);
    for attribute in &message.attributes {
        let LinkAttribute::LinkInfo(infos) = attribute else {
            continue;
        };
        for info in infos {
            match info {
                LinkInfo::Kind(InfoKind::Vxlan) => is_vxlan = true,
                LinkInfo::Data(InfoData::Vxlan(data)) => {
                    for setting in data {
                        match setting {
                            InfoVxlan::Port(number) => port = Some(*number),
                            InfoVxlan::CollectMetadata(on) => metadata = *on,
                            InfoVxlan::Learning(on) => learns = *on,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
    }
    match is_vxlan {
        true => Found::Vxlan(message.header.index, port.filter(|_| metadata && !learns)),
        false => Found::Other,
    }
}
