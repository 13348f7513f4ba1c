//! Names of labs: each carries the process that owns it, so that what a killed run left behind can be told from what is
//! in use.

use std::fs;

/// Every lab's name begins with it.
pub const PREFIX: &str = "sl-";

/// `sl-<pid>_<start time>-<name>`: the start time tells a reused process id. No dot: a bpf file system refuses names
/// with one.
pub fn owned(name: &str) -> String {
    let pid = std::process::id();
    format!("{PREFIX}{pid}_{}-{name}", start_time(pid).unwrap_or(0))
}

/// The owner's part of `entry`, with the prefix, where `entry` belongs to a lab whose process has ended.
pub fn orphan(entry: &str) -> Option<&str> {
    let (owner, _) = entry.strip_prefix(PREFIX)?.split_once('-')?;
    let (pid, start) = owner.split_once('_')?;
    let (pid, start): (u32, u64) = (pid.parse().ok()?, start.parse().ok()?);
    (start_time(pid) != Some(start)).then(|| &entry[..PREFIX.len() + owner.len() + 1])
}

/// In clock ticks since boot; `None` where no such process lives. See proc_pid_stat(5), field 22.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_command = &stat[stat.rfind(')')? + 2..];
    after_command.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_owner_is_no_orphan() {
        assert_eq!(orphan(&owned("x-node-a")), None);
    }

    #[test]
    fn a_reused_process_id_is_an_orphan() {
        let pid = std::process::id();
        assert_eq!(orphan(&format!("sl-{pid}_1-x-node-a")), Some(format!("sl-{pid}_1-").as_str()));
    }

    #[test]
    fn foreign_names_are_left_alone() {
        for name in ["web", "sl-", "sl-demo-node-a", "sl-1-x", "sl-x_y-z", "other-1_1-x"] {
            assert_eq!(orphan(name), None, "{name}");
        }
    }
}
