#!/bin/sh
# Brings the lab up, from busybox init: mounts, modules, containerd. What takes long runs in the
# background; the channel's helper waits for it when a command needs it.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t tmpfs -o mode=1777,size=50% tmp /tmp
mount -t cgroup2 -o nsdelegate none /sys/fs/cgroup
mount -t debugfs none /sys/kernel/debug
mount -t bpf none /sys/fs/bpf
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
busybox hostname lab
ip link set lo up
modprobe virtio_console
# arm64's KVM is built in.
([ -e /dev/kvm ] || modprobe kvm_amd; modprobe -a tun loop overlay erofs veth bridge vsock) 2>/var/log/modprobe.log &

cd /sys/fs/cgroup || exit 1
for controller in $(cat cgroup.controllers); do echo "+$controller" > cgroup.subtree_control; done
mkdir -p containerd session
data=/var/lib/containerd
for word in $(cat /proc/cmdline); do
    case $word in
        lab.containerd=1.7) PATH=/usr/lib/containerd-1.7/bin:$PATH data=/var/lib/containerd-1.7 ;;
    esac
done
(
    echo 0 > /sys/fs/cgroup/containerd/cgroup.procs
    cd / && exec containerd --root "$data" > /var/log/containerd.log 2>&1
) &
