#!/busybox sh
# The virtual machine's first process: runs the tests that the kernel's command line names, and turns it off.
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sysfs /sys
/busybox mount -t devtmpfs devtmpfs /dev
/busybox mount -t tmpfs tmpfs /run
/busybox mount -t tmpfs tmpfs /tmp
/busybox mount -t bpf bpf /sys/fs/bpf
/busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec </dev/null >/dev/console 2>&1
export PATH=/bin
for module in /modules/*; do /busybox insmod "$module"; done
ip link set lo up
/tests/vm --test-threads=1 --color=never "$@"
printf '\nthe tests have ended: %s\n' $?
/busybox poweroff -f
