//! The settings of a pod's network namespace that the capture needs, and putting the old ones back.

use std::fs;
use std::io;
use std::ops::RangeInclusive;

use sealane_common::keys::PodRecord;

use super::KernelError;
use super::netns::NetNs;

const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
const TW_REUSE: &str = "/proc/sys/net/ipv4/tcp_tw_reuse";
const REFLECT: [&str; 2] = ["/proc/sys/net/ipv4/fwmark_reflect", "/proc/sys/net/ipv6/fwmark_reflect"];
const FASTOPEN: &str = "/proc/sys/net/ipv4/tcp_fastopen";

/// The kernel's default; a pod that chose its own keeps it.
const DEFAULT_PORTS: [u16; 2] = [32768, 60999];
/// Application and agent share the ephemeral ports of a destination: 27,647 concurrent connections instead of 14,119.
const WIDE_PORTS: [u16; 2] = [10240, 65535];
/// Servers that take data in a SYN without a cookie: with it, a forged IPv6 source could deliver data to the application.
const TFO_SERVER_WITHOUT_COOKIE: u32 = 0x200;

const CHANGED_PORTS: u32 = 1;
const CHANGED_TW_REUSE: u32 = 2;
const CHANGED_REFLECT: [u32; 2] = [4, 8];
const CHANGED_RESERVED: u32 = 16;

/// Sets what is not set yet and notes the old values in `record`, so that [`restore`] works also from another process.
pub fn apply(netns: &NetNs, agent_ports: &RangeInclusive<u16>, record: &mut PodRecord) -> Result<(), KernelError> {
    netns.enter(|| apply_inside(agent_ports, record)).map_err(sysctl_error("setns"))?
}

/// Puts back what [`apply`] changed, except what somebody has changed since.
pub fn restore(netns: &NetNs, agent_ports: &RangeInclusive<u16>, record: &PodRecord) -> Result<(), KernelError> {
    netns.enter(|| restore_inside(agent_ports, record)).map_err(sysctl_error("setns"))?
}

fn apply_inside(agent_ports: &RangeInclusive<u16>, record: &mut PodRecord) -> Result<(), KernelError> {
    if number(FASTOPEN)? & TFO_SERVER_WITHOUT_COOKIE != 0 {
        return Err(KernelError::FastOpenWithoutCookie);
    }
    if record.changed & CHANGED_PORTS == 0 && port_range()? == DEFAULT_PORTS {
        write(PORT_RANGE, &format!("{} {}", WIDE_PORTS[0], WIDE_PORTS[1]))?;
        record.ports = DEFAULT_PORTS;
        record.changed |= CHANGED_PORTS;
    }
    let tw_reuse = number(TW_REUSE)?;
    if tw_reuse != 1 {
        write(TW_REUSE, "1")?;
        record.tw_reuse = tw_reuse;
        record.changed |= CHANGED_TW_REUSE;
    }
    for (n, path) in REFLECT.into_iter().enumerate() {
        // A kernel without IPv6 has no such file.
        if let Ok(0) = number(path) {
            write(path, "1")?;
            record.changed |= CHANGED_REFLECT[n];
        }
    }
    let reserved = read(RESERVED)?;
    let ours = format!("{}-{}", agent_ports.start(), agent_ports.end());
    if record.changed & CHANGED_RESERVED == 0 && reserved.len() < record.reserved.len() {
        record.reserved[..reserved.len()].copy_from_slice(reserved.as_bytes());
        record.reserved[reserved.len()..].fill(0);
        write(RESERVED, &if reserved.is_empty() { ours } else { format!("{reserved},{ours}") })?;
        record.changed |= CHANGED_RESERVED;
    }
    Ok(())
}

fn restore_inside(agent_ports: &RangeInclusive<u16>, record: &PodRecord) -> Result<(), KernelError> {
    if record.changed & CHANGED_PORTS != 0 && port_range()? == WIDE_PORTS {
        write(PORT_RANGE, &format!("{} {}", record.ports[0], record.ports[1]))?;
    }
    if record.changed & CHANGED_TW_REUSE != 0 && number(TW_REUSE)? == 1 {
        write(TW_REUSE, &record.tw_reuse.to_string())?;
    }
    for (n, path) in REFLECT.into_iter().enumerate() {
        if record.changed & CHANGED_REFLECT[n] != 0 && number(path)? == 1 {
            write(path, "0")?;
        }
    }
    let ours = format!("{}-{}", agent_ports.start(), agent_ports.end());
    if record.changed & CHANGED_RESERVED != 0 && read(RESERVED)?.split(',').any(|range| range == ours) {
        write(RESERVED, zero_terminated(&record.reserved))?;
    }
    Ok(())
}

/// The text before the first zero byte.
pub fn zero_terminated(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    str::from_utf8(&bytes[..end]).unwrap_or("")
}

fn port_range() -> Result<[u16; 2], KernelError> {
    let text = read(PORT_RANGE)?;
    let mut numbers = text.split_whitespace().map(|n| n.parse().unwrap_or(0));
    Ok([numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)])
}

fn number(path: &'static str) -> Result<u32, KernelError> {
    let text = read(path)?;
    text.parse().map_err(|_| sysctl_error(path)(io::Error::new(io::ErrorKind::InvalidData, text.clone())))
}

fn read(path: &'static str) -> Result<String, KernelError> {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).map_err(sysctl_error(path))
}

fn write(path: &'static str, value: &str) -> Result<(), KernelError> {
    // An empty reserved-ports list is cleared by a newline; writing nothing would leave it.
    fs::write(path, format!("{value}\n")).map_err(sysctl_error(path))
}

fn sysctl_error(path: &'static str) -> impl Fn(io::Error) -> KernelError {
    move |source| KernelError::Sysctl { path, source }
}
