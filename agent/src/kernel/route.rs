//! The pod's rule and routes that loop a marked connection over `lo`, by netlink.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use sealane_common::keys::MARK;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::KernelError;
use super::netns::NetNs;

/// Unusual numbers, so that they collide with nobody's.
const TABLE: u32 = 24_225;
const PRIORITY: u32 = 1_514;
const LOOPBACK: u32 = 1;
/// Set for both families: an unset IPv6 metric is 1024, and then the other links would win over `lo`.
const LOOPBACK_METRIC: u32 = 100;
/// Catches sockets bound to a device, whose lookup skips `lo`.
const LINK_METRIC: u32 = 200;

/// A netlink connection inside the pod.
pub struct Routes {
    handle: Handle,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Routes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// What the pod's network looks like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Every configured address.
    pub addresses: BTreeSet<IpAddr>,
    /// Every link, `lo` among them.
    pub links: BTreeSet<u32>,
}

impl Routes {
    /// Connects and begins to watch: a message on `changes` means that addresses, links, rules or routes changed.
    pub fn open(netns: &NetNs, changes: mpsc::Sender<u32>, pod_id: u32) -> Result<Self, KernelError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let failed = |source| KernelError::Netlink { what: "connection", source };
        let open = || Ok((rtnetlink::new_connection()?, rtnetlink::new_multicast_connection(&groups)?));
        let ((connection, handle, _), (watch, _, mut events)) = netns.enter(open).map_err(failed)?.map_err(failed)?;
        let watch = tokio::spawn(async move {
            tokio::pin!(watch);
            loop {
                tokio::select! {
                    () = &mut watch => return,
                    event = events.next() => match event {
                        // A full queue already holds a message for this pod or for one that is about to be looked at.
                        Some(_) => drop(changes.try_send(pod_id)),
                        None => return,
                    },
                }
            }
        });
        Ok(Self { handle, tasks: [tokio::spawn(connection), watch] })
    }

    /// Addresses and links as they are now.
    pub async fn network(&self) -> Result<Network, KernelError> {
        let failed = |source| KernelError::Route { what: "dump", source };
        let mut network = Network::default();
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) = addresses.try_next().await.map_err(failed)? {
            // IFA_LOCAL is the own address of a point-to-point link, where IFA_ADDRESS is the other end's.
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            network.addresses.extend(local.or(address).filter(|ip| !ip.is_loopback()));
        }
        let mut links = self.handle.link().get().execute();
        while let Some(message) = links.try_next().await.map_err(failed)? {
            network.links.insert(message.header.index);
        }
        Ok(network)
    }

    /// Puts the rule and the routes where they are missing; true where something was. `sources` are the addresses that
    /// captured connections shall come from: without `src` the kernel would use the destination itself.
    pub async fn ensure(&self, network: &Network, sources: &[IpAddr]) -> Result<bool, KernelError> {
        let mut repaired = false;
        for version in [IpVersion::V4, IpVersion::V6] {
            let is_family = |ip: &&IpAddr| ip.is_ipv4() == matches!(version, IpVersion::V4);
            let configured = |ip: &&IpAddr| network.addresses.contains(*ip);
            let Some(source) = sources.iter().filter(is_family).find(configured) else { continue };
            if self.our_rules(&version).await?.is_empty() {
                self.add_rule(&version).await?;
                repaired = true;
            }
            let present = self.our_routes(&version).await?;
            for link in &network.links {
                let wanted = route(*source, *link);
                if !present.iter().any(|route| same_route(route, &wanted)) {
                    match self.handle.route().add(wanted).replace().execute().await {
                        Ok(()) => repaired = true,
                        // A link that is down takes no route; RTM_NEWLINK tells when it comes up.
                        Err(error) if is_errno(&error, &[libc::ENETDOWN, libc::ENODEV, libc::EINVAL]) => {}
                        Err(source) => return Err(KernelError::Route { what: "route add", source }),
                    }
                }
            }
        }
        Ok(repaired)
    }

    /// Removes rule and routes; what is missing already is fine.
    pub async fn remove(&self) -> Result<(), KernelError> {
        for version in [IpVersion::V4, IpVersion::V6] {
            for rule in self.our_rules(&version).await? {
                gone(self.handle.rule().del(rule).execute().await, "rule del")?;
            }
            for route in self.our_routes(&version).await? {
                gone(self.handle.route().del(route).execute().await, "route del")?;
            }
        }
        Ok(())
    }

    async fn our_rules(&self, version: &IpVersion) -> Result<Vec<RuleMessage>, KernelError> {
        let rules = self.handle.rule().get(version.clone()).execute();
        let ours = |rule: &RuleMessage| {
            rule.attributes.contains(&RuleAttribute::Table(TABLE))
                && rule.attributes.contains(&RuleAttribute::FwMark(MARK))
        };
        let found = rules.try_filter(|rule| std::future::ready(ours(rule))).try_collect().await;
        found.map_err(|source| KernelError::Route { what: "rule dump", source })
    }

    async fn our_routes(&self, version: &IpVersion) -> Result<Vec<RouteMessage>, KernelError> {
        let filter = match version {
            IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().table_id(TABLE).build(),
            IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().table_id(TABLE).build(),
        };
        let ours = |route: &RouteMessage| route.attributes.contains(&RouteAttribute::Table(TABLE));
        let routes = self.handle.route().get(filter).execute();
        let found = routes.try_filter(|route| std::future::ready(ours(route))).try_collect().await;
        found.map_err(|source| KernelError::Route { what: "route dump", source })
    }

    async fn add_rule(&self, version: &IpVersion) -> Result<(), KernelError> {
        let add = self.handle.rule().add().fw_mark(MARK).table_id(TABLE).priority(PRIORITY).action(RuleAction::ToTable);
        let mask = RuleAttribute::FwMask(MARK);
        let added = match version {
            IpVersion::V4 => {
                let mut add = add.v4();
                add.message_mut().attributes.push(mask);
                add.execute().await
            }
            IpVersion::V6 => {
                let mut add = add.v6();
                add.message_mut().attributes.push(mask);
                add.execute().await
            }
        };
        match added {
            Err(error) if is_errno(&error, &[libc::EEXIST]) => Ok(()),
            result => result.map_err(|source| KernelError::Route { what: "rule add", source }),
        }
    }
}

/// `local default dev LINK src SOURCE metric M table T`.
fn route(source: IpAddr, link: u32) -> RouteMessage {
    let metric = if link == LOOPBACK { LOOPBACK_METRIC } else { LINK_METRIC };
    match source {
        IpAddr::V4(source) => RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(TABLE)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .output_interface(link)
            .pref_source(source)
            .priority(metric)
            .build(),
        IpAddr::V6(source) => RouteMessageBuilder::<Ipv6Addr>::new()
            .table_id(TABLE)
            .kind(RouteType::Local)
            .output_interface(link)
            .pref_source(source)
            .priority(metric)
            .build(),
    }
}

fn same_route(a: &RouteMessage, b: &RouteMessage) -> bool {
    let key = |route: &RouteMessage| {
        let wanted = |attribute: &&RouteAttribute| {
            matches!(attribute, RouteAttribute::Oif(_) | RouteAttribute::PrefSource(_) | RouteAttribute::Priority(_))
        };
        let mut attributes: Vec<_> = route.attributes.iter().filter(wanted).map(|a| format!("{a:?}")).collect();
        attributes.sort();
        attributes
    };
    key(a) == key(b) && a.header.kind == b.header.kind && a.header.address_family == b.header.address_family
}

fn gone(result: Result<(), rtnetlink::Error>, what: &'static str) -> Result<(), KernelError> {
    match result {
        Err(error) if is_errno(&error, &[libc::ENOENT, libc::ESRCH]) => Ok(()),
        result => result.map_err(|source| KernelError::Route { what, source }),
    }
}

fn is_errno(error: &rtnetlink::Error, codes: &[i32]) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            message.to_io().raw_os_error().is_some_and(|code| codes.contains(&code))
        }
        _ => false,
    }
}
