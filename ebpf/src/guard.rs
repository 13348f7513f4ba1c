//! cgroup/setsockopt: refuses, in enrolled pods, the options that would undo the capture of a socket.

use aya_ebpf::EbpfContext;
use aya_ebpf::programs::SockoptContext;
use sealane_common::keys::{AGENT_MARK, GUARD, MARK};
use sealane_common::reason::Reason;

use crate::ctx;

const SOL_IP: i32 = 0;
const SOL_SOCKET: i32 = 1;
const SOL_IPV6: i32 = 41;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;
const SO_BINDTOIFINDEX: i32 = 62;
const IP_TRANSPARENT: i32 = 19;
const IPV6_TRANSPARENT: i32 = 75;
/// The bits that mean something to Sealane; all others are the application's.
const OURS: u32 = MARK | AGENT_MARK;

/// Refuses a change of the mark bit, transparent sockets, and binding a captured socket to a device.
#[inline(always)]
pub fn try_setsockopt(ctx: &SockoptContext) -> Result<(), Reason> {
    let refused = refusal(ctx);
    if refused.is_none() {
        ctx::keep_long_option(ctx);
    }
    refused.map_or(Ok(()), Err)
}

#[inline(always)]
fn refusal(ctx: &SockoptContext) -> Option<Reason> {
    let (level, option) = ctx::option(ctx);
    // The connect hook marks the first subflow of an MPTCP connection, while the application holds another socket, whose mark
    // the kernel copies to the subflows: whether that one is captured cannot be told, so it counts as captured.
    let (mark, mptcp) = ctx::option_socket(ctx);
    let reason = match (level, option) {
        (SOL_SOCKET, SO_MARK) => {
            // A long option would be read again from the caller's memory after this look.
            let judged = !mptcp && !ctx::is_long_option(ctx);
            let wanted = ctx::option_u32(ctx)?;
            if judged && wanted & OURS == mark & OURS {
                return None;
            }
            Reason::MarkChange
        }
        (SOL_SOCKET, SO_BINDTODEVICE | SO_BINDTOIFINDEX) if mark & MARK != 0 || mptcp => Reason::OptionRefused,
        (SOL_IP, IP_TRANSPARENT) | (SOL_IPV6, IPV6_TRANSPARENT) => Reason::OptionRefused,
        _ => return None,
    };
    let pod = ctx::pod(ctx.as_ptr())?;
    (pod.flags & GUARD != 0 && !ctx::is_agent()).then_some(reason)
}
