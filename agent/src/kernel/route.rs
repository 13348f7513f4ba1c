//! The pod's rule and routes that loop a marked connection over `lo`, by netlink.

use std::collections::{BTreeSet, HashSet};
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
/// Right behind the table of local addresses, so that no other rule comes first.
const PRIORITY: u32 = 1;
const LOOPBACK: u32 = 1;
const NO_LINK: u32 = 0;
/// Set for both families: an unset IPv6 metric is 1024, and then the other links would win over `lo`.
const LOOPBACK_METRIC: u32 = 100;
/// Catches sockets bound to a device, whose lookup skips `lo`. The link's index is added: routes that differ in nothing but the
/// link would replace each other.
const LINK_METRIC: u32 = 200;
/// Ends the table: a marked connection that finds no loop goes nowhere, rather than on to the main table in plaintext.
const LAST_METRIC: u32 = u32::MAX - 1;

/// A netlink connection inside the pod.
pub struct Routes {
    handle: Handle,
    /// What has stood, for IPv4 or not.
    placed: HashSet<(bool, Place)>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Routes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    Rule,
    /// Over a link, or [`NO_LINK`] for the dead end.
    Route(u32),
}

/// What the pod's network looks like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Every configured address.
    pub addresses: BTreeSet<IpAddr>,
    /// Every link, `lo` among them.
    pub links: BTreeSet<u32>,
}

impl Network {
    /// The address that captured connections come from: a preferred one, else any that is not link-local.
    fn source(&self, version: &IpVersion, preferred: &[IpAddr]) -> Option<IpAddr> {
        let is_v4 = matches!(version, IpVersion::V4);
        let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let usable = |ip: &&IpAddr| ip.is_ipv4() == is_v4 && !link_local(ip) && self.addresses.contains(*ip);
        preferred.iter().find(usable).or_else(|| self.addresses.iter().find(usable)).copied()
    }
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
        Ok(Self { handle, placed: HashSet::new(), tasks: [tokio::spawn(connection), watch] })
    }

    /// Addresses and links as they are now.
    pub async fn network(&self) -> Result<Network, KernelError> {
        let failed = |source| KernelError::Route { what: "dump", source };
        let mut network = Network::default();
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) = addresses.try_next().await.map_err(failed)? {
            // IFA_LOCAL is the own address of a point-to-point link, where IFA_ADDRESS is the other end's.
            let (mut local, mut address) = (None, None);
            for attribute in &message.attributes {
                if let AddressAttribute::Local(ip) = attribute {
                    local = Some(*ip);
                } else if let AddressAttribute::Address(ip) = attribute {
                    address = Some(*ip);
                }
            }
            network.addresses.extend(local.or(address).filter(|ip| !ip.is_loopback()));
        }
        let mut links = self.handle.link().get().execute();
        while let Some(message) = links.try_next().await.map_err(failed)? {
            network.links.insert(message.header.index);
        }
        Ok(network)
    }

    /// Puts the rules and the routes where they are missing; true where one had stood before. Both families get the rule and
    /// the dead end; a family with an address gets the loop as well, or the call fails. `preferred` are the addresses that
    /// captured connections shall come from: without `src` the kernel would use the destination itself.
    pub async fn ensure(&mut self, network: &Network, preferred: &[IpAddr]) -> Result<bool, KernelError> {
        let mut repaired = false;
        for version in [IpVersion::V4, IpVersion::V6] {
            let v4 = matches!(version, IpVersion::V4);
            let source = network.source(&version, preferred);
            let present = self.our_routes(&version).await?;
            let mut routes = vec![(NO_LINK, dead_end(&version))];
            if let Some(source) = &source {
                routes.extend(network.links.iter().map(|link| (*link, route(*source, *link))));
            }
            // Routes first: a rule without them would lead to nowhere, which is safe, but needlessly so.
            for (link, wanted) in routes {
                let place = (v4, Place::Route(link));
                if !present.iter().any(|route| same_route(route, &wanted)) {
                    match self.handle.route().add(wanted).replace().execute().await {
                        Ok(()) => repaired |= self.placed.contains(&place),
                        // A pod without IPv6, and links that are down or without it, take no such route; netlink tells when
                        // that changes.
                        Err(rtnetlink::Error::NetlinkError(_))
                            if link != LOOPBACK && (link != NO_LINK || source.is_none()) =>
                        {
                            continue;
                        }
                        Err(source) => return Err(KernelError::Route { what: "route add", source }),
                    }
                }
                self.placed.insert(place);
            }
            if !self.our_rules(&version).await?.iter().any(is_whole) {
                match self.add_rule(&version).await {
                    Ok(()) => repaired |= self.placed.contains(&(v4, Place::Rule)),
                    Err(_) if source.is_none() => continue,
                    Err(error) => return Err(error),
                }
            }
            self.placed.insert((v4, Place::Rule));
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

/// `unreachable default metric M table T`.
fn dead_end(version: &IpVersion) -> RouteMessage {
    match version {
        IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(TABLE)
            .kind(RouteType::Unreachable)
            .priority(LAST_METRIC)
            .build(),
        IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new()
            .table_id(TABLE)
            .kind(RouteType::Unreachable)
            .priority(LAST_METRIC)
            .build(),
    }
}

/// `local default dev LINK src SOURCE metric M table T`.
fn route(source: IpAddr, link: u32) -> RouteMessage {
    let metric = if link == LOOPBACK { LOOPBACK_METRIC } else { LINK_METRIC.saturating_add(link) };
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

/// A rule of ours with another mask or priority would not do.
fn is_whole(rule: &RuleMessage) -> bool {
    let parts = [RuleAttribute::FwMask(MARK), RuleAttribute::Priority(PRIORITY)];
    parts.iter().all(|part| rule.attributes.contains(part))
}

/// The kernel adds attributes of its own; and it shows IPv6's dead end as a route over `lo`.
fn same_route(held: &RouteMessage, wanted: &RouteMessage) -> bool {
    let told = |attribute: &&RouteAttribute| {
        matches!(attribute, RouteAttribute::Oif(_) | RouteAttribute::PrefSource(_) | RouteAttribute::Priority(_))
    };
    held.header.kind == wanted.header.kind
        && held.header.address_family == wanted.header.address_family
        && wanted.attributes.iter().filter(told).all(|attribute| held.attributes.contains(attribute))
}

fn gone(result: Result<(), rtnetlink::Error>, what: &'static str) -> Result<(), KernelError> {
    match result {
        Err(error) if is_errno(&error, &[libc::ENOENT, libc::ESRCH]) => Ok(()),
        result => result.map_err(|source| KernelError::Route { what, source }),
    }
}

fn is_errno(error: &rtnetlink::Error, codes: &[i32]) -> bool {
    let rtnetlink::Error::NetlinkError(message) = error else { return false };
    message.to_io().raw_os_error().is_some_and(|code| codes.contains(&code))
}
