//! Scalars of the file: from text to value, or why not. The reason continues the sentence `field "text" ...`.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::identity::{SpiffeId, TrustDomain};
use crate::workload::Mode;

/// Longest duration taken: nothing here is meant to last longer, and no clock arithmetic can overflow below it.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 3600);

/// `30ms`, `5s`, `2m`, `1h`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("must be a whole number with a unit: ms, s, m or h".into()),
    };
    let number: u64 = number.parse().map_err(|_| "must be a whole number with a unit: ms, s, m or h".to_owned())?;
    let duration = number.checked_mul(millis).map(Duration::from_millis).filter(|duration| *duration <= MAX_DURATION);
    duration.ok_or_else(|| "is longer than a year".into())
}

/// As [`duration`], but not zero.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|d| if d.is_zero() { Err("must be more than zero".into()) } else { Ok(d) })
}

/// A whole number from 1.
pub(super) fn count(text: &str) -> Result<u32, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("must be a whole number from 1 to {}", u32::MAX))
}

/// A TCP port.
pub(super) fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port > 0).ok_or_else(|| "must be a port, 1 to 65535".into())
}

/// `15001-15004`: four ports, two for each of the two agents that live side by side during an upgrade.
pub(super) fn four_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').ok_or("must be four ports, as 15001-15004")?;
    let (first, last) = (port(first.trim())?, port(last.trim())?);
    if first < 1024 {
        return Err("must begin at 1024 or above".into());
    }
    if u32::from(last) != u32::from(first) + 3 {
        return Err("must be exactly four ports, as 15001-15004".into());
    }
    Ok(first..=last)
}

/// An address that a pod or a service can have.
pub(super) fn ip(text: &str) -> Result<IpAddr, String> {
    if text.contains('%') {
        return Err("must not have a zone".into());
    }
    let ip: IpAddr = text.parse().map_err(|_| "is not an IP address".to_owned())?;
    unicast(ip)?;
    if ip.is_loopback() {
        return Err("is a loopback address".into());
    }
    if ip.is_unspecified() {
        return Err("is the unspecified address".into());
    }
    if matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        return Err("is a link-local address, which says nothing without a zone".into());
    }
    Ok(ip)
}

/// Where a server of the agent listens: `address:port`.
pub(super) fn listen(text: &str) -> Result<SocketAddr, String> {
    if text.contains('%') {
        return Err("must not have a zone".into());
    }
    let listen: SocketAddr = text.parse().map_err(|_| "is not address:port".to_owned())?;
    unicast(listen.ip())?;
    if listen.port() == 0 {
        return Err("must name a port, 1 to 65535".into());
    }
    Ok(listen)
}

/// As [`listen`], on loopback: what /state tells is for this host alone.
pub(super) fn loopback_listen(text: &str) -> Result<SocketAddr, String> {
    let listen = listen(text)?;
    if !listen.ip().is_loopback() {
        return Err("must be a loopback address: /state asks nobody who they are".into());
    }
    Ok(listen)
}

/// A name of Kubernetes' kind. It also names directories, files and metrics, so nothing else gets through.
pub(super) fn name(text: &str) -> Result<String, String> {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let good = text.len() <= 253
        && text.bytes().all(inner)
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().last().is_some_and(|b| b.is_ascii_alphanumeric());
    if good {
        Ok(text.into())
    } else {
        Err("must be 1 to 253 of A-Z a-z 0-9 . _ - and begin and end with a letter or digit".into())
    }
}

/// An absolute path without `..`.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err("must be an absolute path".into());
    }
    if path.components().any(|part| part == Component::ParentDir) || text.contains('\0') {
        return Err("must be a path without ..".into());
    }
    // Rebuilt from its parts, so that two spellings of one path compare as one.
    Ok(path.components().collect())
}

/// A network namespace's mount.
pub(super) fn netns(text: &str) -> Result<PathBuf, String> {
    // The kernel record that un-enrolment reads has 256 bytes, the last of them zero.
    if text.len() > 255 {
        return Err("is longer than 255 bytes".into());
    }
    absolute_path(text)
}

/// STRICT, PERMISSIVE or DISABLED.
pub(super) fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "STRICT" => Ok(Mode::Strict),
        "PERMISSIVE" => Ok(Mode::Permissive),
        "DISABLED" => Ok(Mode::Disabled),
        _ => Err("must be STRICT, PERMISSIVE or DISABLED".into()),
    }
}

/// A workload's SPIFFE ID.
pub(super) fn spiffe_id(text: &str) -> Result<SpiffeId, String> {
    text.parse().map_err(|why| format!("is not a SPIFFE ID: {why}"))
}

/// A trust domain.
pub(super) fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    text.parse().map_err(|why| format!("is not a trust domain: {why}"))
}

fn unicast(ip: IpAddr) -> Result<(), String> {
    if matches!(ip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        return Err("is an IPv4-mapped address; write it as IPv4".into());
    }
    if ip.is_multicast() || matches!(ip, IpAddr::V4(v4) if v4.is_broadcast()) {
        return Err("is a multicast or broadcast address".into());
    }
    Ok(())
}
